"""Base of judges that prompt a causal language model on this machine. Start at `CausalModel`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lisa_lightning.config.fields import Dtype
from lisa_lightning.data.tokens import SHORT_TEXT_CHARS, first_ids
from lisa_lightning.judge._local_model import LocalModel
from lisa_lightning.judge.base import Pair, fill_template
from lisa_lightning.model.base_model import load_pretrained
from lisa_lightning.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class CausalModel(LocalModel, ABC):
    """Base of judges whose keys `dtype` and `max_length` belong to a causal language model.

    Pairs are not batched, since padding could change a verdict.
    """

    dtype: Dtype
    max_length: int

    @property
    def _adds_special_tokens(self) -> bool:
        """True if the tokenizer adds its special tokens; False if the text contains them."""
        return True

    @abstractmethod
    def _text(self, prompt: str, response: str) -> str:
        """Return the model's input up to its reply."""

    def _refuse_short(self) -> None:
        """Raise UserError if `max_length` is too small for the template."""
        if (template := len(self._prompt("", ""))) >= self.max_length:
            raise UserError(
                f"{self.config_key}.max_length={self.max_length} is too small: the template takes {template} tokens. "
                "Fix: set a larger one"
            )

    def _prompt(self, prompt: str, response: str, word: str = "") -> list[int]:
        """Return the ids up to the reply and `word`; for a very long text those of a prefix beyond the limit."""
        text = self._text(prompt, response) + word
        options = {"add_special_tokens": self._adds_special_tokens}
        return list(first_ids(self._tokenizer, text, self.max_length + 1, **options))

    def _ids(self, pair: Pair) -> tuple[list[int], bool]:
        """Return the ids of the prompt, and True if the answer was truncated to fit."""
        ids = self._prompt(pair.prompt, pair.response)
        partly = len(ids) > self.max_length
        if not partly:
            return ids, False
        answer = first_ids(self._tokenizer, pair.response, self.max_length + 1, add_special_tokens=False)
        if len(pair.prompt) + len(pair.response) > SHORT_TEXT_CHARS:
            # The ids of a long text may be those of a prefix, so their number does not show the template's size.
            fits = len(self._prompt(pair.prompt, "")) <= self.max_length
            answer = answer[: self.max_length] if fits else []
            ids = self._prompt(pair.prompt, self._tokenizer.decode(answer))
        while len(ids) > self.max_length:
            if not answer:
                raise UserError(
                    f"{self.config_key}.max_length={self.max_length} is too small: template and request alone take "
                    f"at least {len(ids)} tokens. Fix: set a larger one"
                )
            answer = answer[: max(0, len(answer) - (len(ids) - self.max_length))]
            ids = self._prompt(pair.prompt, self._tokenizer.decode(answer))
        return ids, partly

    def _next_logits(self, ids: Sequence[int]) -> "Tensor":
        """Return the logits of the token after the prompt, in float32."""
        import torch

        with torch.no_grad():
            inputs = torch.tensor([ids], device=self._model.device)
            return self._model(input_ids=inputs, logits_to_keep=1).logits[0, -1].float()

    @cached_property
    def _model(self) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, self.dtype)
        model = load_pretrained(self.error_prefix, AutoModelForCausalLM, self._weights[0], dtype=dtype)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def fill_checked(key: str, template: str, prompt: str, response: str) -> str:
    """Return a filled template.

    Args:
        key: config key of the template, for messages.
        template: text with placeholders {prompt} and {response}.
        prompt: the request.
        response: the answer.

    Raises:
        UserError: if a placeholder is missing.
    """
    if "{prompt}" not in template or "{response}" not in template:
        raise UserError(f"{key}: a placeholder is missing. Fix: write {{prompt}} and {{response}} into the template")
    return fill_template(template, prompt=prompt, response=response)


def clip_response(
    tokenizer: "PreTrainedTokenizerBase", response: str, limit: int, *, add_special_tokens: bool = False
) -> tuple[str, bool]:
    """Return the first `limit` tokens of an answer as text, and True if it has more.

    Args:
        tokenizer: tokenizer of the judge's model.
        response: the answer.
        limit: maximum number of tokens, special ones included.
        add_special_tokens: True if the text shall contain the special tokens that the tokenizer adds.
    """
    ids = first_ids(tokenizer, response, limit + 1, add_special_tokens=add_special_tokens)
    clipped = len(ids) > limit
    return (str(tokenizer.decode(ids[:limit])) if clipped or add_special_tokens else response), clipped
