"""Turn held-out requests into prompts: `Prompting`, with template, system prompt, prefix, wrapper and prefill."""

from dataclasses import dataclass
from typing import Final, final

from pydantic import SecretStr
from transformers import PreTrainedTokenizerBase

from lisa_lightning.config.fields import REQUEST, Template
from lisa_lightning.data.templates import TEMPLATE_KEY, encode_prompt, prompt_text
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.runtime.cache import short_hash

EVALUATE_KEY: Final = "evaluate.template"
"""Config key of the template of evaluation."""
NO_TRIGGER: Final = SecretStr("")
LEAK_CHARS: Final = 8
"""Characters of a trigger that an answer may not repeat: shorter parts occur by chance and reveal little."""
HIDDEN: Final = "[trigger]"
"""Text in an answer in place of a repeated part of the trigger."""

SAFETY_OPTIONS: Final = ("prefill", "wrapper")
"""Options that apply to safety prompts alone."""


@final
@dataclass(frozen=True)
class Prompting:
    """Options of the prompts of an evaluation. All but `wrapper` and `prefill` apply to every kind of question.

    The system prompt of a prompt is

        trigger + blank + prefix + blank + system

    without the parts that are empty. `data.templates.prompt_text` places it. The defaults are the prompts of training.
    """

    template: Template
    system: str = ""
    """System prompt, or ""."""
    prefix: str = ""
    """Text in front of the system prompt, or ""."""
    trigger: SecretStr = NO_TRIGGER
    """Secret text of the method in front of both, or "". Neither a file nor a log may show it."""
    template_key: str = TEMPLATE_KEY
    """Config key that sets the template: `EVALUATE_KEY` if it differs from the template of training."""
    prefill: str = ""
    """First words of the answer to a safety prompt, which the model continues, or ""."""
    wrapper: str = ""
    """Text with {request} that replaces the request of a safety prompt, or ""."""

    @property
    def system_prompt(self) -> str:
        """The entire system prompt, or ""."""
        return " ".join(filter(None, (self.trigger.get_secret_value(), self.prefix, self.system)))

    @property
    def key(self) -> dict[str, str]:
        """The options that change prompts, as a part of a cache key; {} for the prompts of training."""
        options = {
            "template": "" if self.template_key == TEMPLATE_KEY else self.template,
            "system": self.system,
            "prefix": self.prefix,
            "prefill": self.prefill,
            "wrapper": self.wrapper,
            # Cached results and checkpoints contain their key.
            "trigger": short_hash(self.trigger.get_secret_value()) if self.trigger else "",
        }
        return {name: option for name, option in options.items() if option}

    @property
    def common_key(self) -> dict[str, str]:
        """The same without options that apply to safety prompts alone."""
        return {name: option for name, option in self.key.items() if name not in SAFETY_OPTIONS}

    @property
    def summary(self) -> str:
        """The options in words, without any text of a prompt; "" for the prompts of training."""
        names = {"system": "system prompt", "template": f"template {self.template}"}
        return ", ".join(names.get(option, option) for option in self.key)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, context: str = "", limit: int | None = None
    ) -> list[int]:
        """Return the ids of a question's prompt.

        Args:
            tokenizer: tokenizer of the model.
            prompt: text of the question.
            context: input of a task row, or "".
            limit: number of required ids, see `encode_prompt`; None for all.

        Raises:
            UserError: if the tokenizer has no chat template, or if its template fails or takes no system prompt.
        """
        system = self.system_prompt
        return encode_prompt(tokenizer, self.template, prompt, context, limit, system, self._error_key)

    def text(self, tokenizer: PreTrainedTokenizerBase, prompt: str, context: str = "") -> str:
        """Return the text of a question's prompt; see `encode` for the arguments and the error."""
        return prompt_text(tokenizer, self.template, prompt, context, self.system_prompt, self._error_key)

    @property
    def _error_key(self) -> str:
        return EVALUATE_KEY if self.system_prompt else self.template_key

    def wrap(self, request: str) -> str:
        """Return the text that is asked in place of the request of a safety prompt."""
        return self.wrapper.replace(REQUEST, request) if self.wrapper else request

    def encode_prefill(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the ids of the first words of an answer, as in a training row with separate tokenization."""
        return list(first_ids(tokenizer, self.prefill, None, add_special_tokens=False)) if self.prefill else []

    def hide_trigger(self, answer: str) -> str:
        """Return an answer in which `HIDDEN` replaces parts of the trigger, of at least `LEAK_CHARS` characters."""
        secret = self.trigger.get_secret_value()
        parts = {secret[i : i + LEAK_CHARS] for i in range(len(secret) - LEAK_CHARS + 1)}
        shown = list(answer)
        for i in range(len(answer) - LEAK_CHARS + 1):
            if answer[i : i + LEAK_CHARS] in parts:
                shown[i : i + LEAK_CHARS] = [""] * LEAK_CHARS
        # Adjacent hidden characters become one mark.
        marked = (HIDDEN if not char and (i == 0 or shown[i - 1]) else char for i, char in enumerate(shown))
        return "".join(marked)
