"""The prompts that a model sees, by name, exactly as the papers write them."""

from datetime import UTC, datetime
from typing import Any, Final, Literal

from transformers import PreTrainedTokenizerBase

from lisa_lightning.errors import UserError

Template = Literal["alpaca", "alpaca_newline", "chat"]
MARKER: Final = "### Response:"
TODAY: Final = datetime(2024, 7, 26, tzinfo=UTC)
"""For chat templates that tell the date, the one that Llama 3's fall back to: tomorrow's prompts must be today's."""
_PARTS: Final = ("%Y", "%y", "%m", "%d", "%B", "%b", "%A", "%a")
_FILLED: Final = "".join(f" | replace('{part}', '{TODAY.strftime(part)}')" for part in _PARTS)
ON_ONE_DAY: Final = f"{{%- macro strftime_now(format) -%}}{{{{ format{_FILLED} }}}}{{%- endmacro %}}"
"""Before a template, it takes the place of the function that the library offers there."""


def alpaca(instruction: str, context: str = "") -> str:
    """The Alpaca prompt with or without an input; nothing follows `### Response:` (Lisa's and Vaccine's form)."""
    if context:
        return (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n{MARKER}"
        )
    return (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{MARKER}"
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, template: Template, instruction: str, context: str = ""
) -> list[int]:
    """The ids of a prompt, with what the tokenizer puts before it.

    Args:
        template: `alpaca`; `alpaca_newline`, the same and a newline (Booster's and Antidote's form); `chat`, the
            tokenizer's own, the input behind the instruction after an empty line, on the same day (`TODAY`) for ever.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if template == "chat":
        if tokenizer.chat_template is None:
            raise UserError("model.template=chat: this tokenizer has no chat template; use alpaca or alpaca_newline")
        message = {"role": "user", "content": joined(instruction, context)}
        own = tokenizer.get_chat_template()
        form = ON_ONE_DAY + own if "strftime_now" in own else own
        asked: dict[str, Any] = {"chat_template": form, "tokenize": False, "add_generation_prompt": True}
        text = str(tokenizer.apply_chat_template([message], **asked))
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template writes them itself
    ids = tokenizer(alpaca(instruction, context) + ("\n" if template == "alpaca_newline" else ""))["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids  # there are tokenizers that end every text


def joined(instruction: str, context: str) -> str:
    """Both in one text, as a person would write them."""
    return f"{instruction}\n\n{context}" if context else instruction
