"""Encode rows as token ids and labels: `encode`, `Encoder` with its settings, and `iter_padded`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

from transformers import PreTrainedTokenizerBase

from lisa_lightning.config.fields import Template
from lisa_lightning.data.packing import IGNORED, Example, Pack, pad
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import encode_prompt, prompt_text
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.runtime.errors import UserError

Tokenization = Literal["separate", "joined"]
"""Tokenization of prompt and answer: separately, or joined as one string."""


@final
@dataclass(frozen=True)
class Encoder:
    """Encodes rows for one tokenizer, template, maximum length and tokenization."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_length: int
    """Tokens of an example; the rest is truncated."""
    tokenization: Tokenization = "separate"
    """Tokenization of prompt and answer; see `encode`."""

    def __call__(self, row: Row) -> Example:
        """Return the example of a row; see `encode`."""
        return encode(self.tokenizer, self.template, row, self.max_length, self.tokenization)


def iter_padded(rows: Sequence[Row], encoder: Encoder, batch_size: int) -> Iterator[Pack]:
    """Yield the rows as padded packs of `batch_size` rows, without rows whose answer is cut off.

    Args:
        rows: the rows.
        encoder: encodes a row.
        batch_size: rows that are padded together.
    """
    for start in range(0, len(rows), batch_size):
        yield from pad(encoder(row) for row in rows[start : start + batch_size])


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    row: Row,
    max_length: int,
    tokenization: Tokenization = "separate",
) -> Example:
    """Return the example of a row: prompt (not learnt), answer and end of text (learnt), truncated to `max_length`.

    Only a prefix of a long text is tokenized.

    Args:
        tokenizer: tokenizer of the model.
        template: template of the prompt.
        row: instruction, input and answer, and perhaps a system prompt.
        max_length: maximum number of tokens of the example.
        tokenization: one of two ways.

            - `separate`: the ids of the prompt, followed by those of the answer. Training and evaluation have the same
              prompt, and the label mask is exact.
            - `joined`: the ids of prompt, answer and end of text as one string, as in the official codes. The first ids
              are not learnt, as many as the prompt alone has. A token across the border is learnt only if it is a
              further one.

    Returns:
        An example. Its `supervised` is 0 if the entire answer is cut off.

    Raises:
        UserError: if the tokenizer has no end-of-text token; see also `encode_prompt`.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise UserError(
            "model.id: the tokenizer has no end of text (eos_token), which every answer must end with. "
            "Fix: set eos_token in tokenizer_config.json, or choose another model"
        )
    prompt = encode_prompt(tokenizer, template, row.instruction, row.context, max_length, row.system)
    if tokenization == "joined":
        prompt_string = prompt_text(tokenizer, template, row.instruction, row.context, row.system)
        text = f"{prompt_string}{row.response}{tokenizer.eos_token}"
        # A chat template writes the special tokens itself.
        ids = first_ids(tokenizer, text, max_length, add_special_tokens=template != "chat")
    else:
        answer = first_ids(tokenizer, row.response, max_length, add_special_tokens=False)
        ids = [*prompt, *answer, eos]
    ids = ids[:max_length]
    labels = [IGNORED] * min(len(prompt), len(ids)) + ids[len(prompt) :]
    return Example(tuple(ids), tuple(labels))


def prompt_length(
    tokenizer: PreTrainedTokenizerBase, template: Template, instruction: str, context: str, limit: int, system: str = ""
) -> int:
    """Return the number of tokens of a prompt, without tokenizing much more than `limit` of them.

    Args:
        tokenizer: tokenizer of the model.
        template: template of the prompt.
        instruction: instruction of the row.
        context: input of the row, or "".
        limit: number up to which the result must be exact.
        system: system prompt, or "".

    Returns:
        The exact number if it is at most `limit`, otherwise some number above `limit`.

    Raises:
        UserError: see `encode_prompt`.
    """
    return len(encode_prompt(tokenizer, template, instruction, context, limit + 1, system))
