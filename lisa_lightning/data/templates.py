"""Write the prompts that a model sees, by name, exactly as the papers have them."""

from datetime import UTC, datetime
from typing import Any, Final, Literal

from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.normal_form import is_blank
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.runtime.errors import UserError, first_line, printable

Template = Literal["alpaca", "alpaca_newline", "chat"]
MARKER: Final = "### Response:"
MAX_ERROR_CHARS: Final = 200
"""Characters of a template's own error message that are shown."""
TODAY: Final = datetime(2024, 7, 26, tzinfo=UTC)
"""For chat templates that tell the date, the one that Llama 3's fall back to: tomorrow's prompts must be today's."""
_PARTS: Final = ("%Y", "%y", "%m", "%d", "%B", "%b", "%A", "%a")
_FILLED: Final = "".join(f" | replace('{part}', '{TODAY.strftime(part)}')" for part in _PARTS)
ON_ONE_DAY: Final = f"{{%- macro strftime_now(format) -%}}{{{{ format{_FILLED} }}}}{{%- endmacro %}}"
"""Before a template, it takes the place of the function that the library offers there."""


def alpaca(instruction: str, context: str = "") -> str:
    """Return the Alpaca prompt with or without an input (Lisa's and Vaccine's form). It ends with `### Response:`."""
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
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    instruction: str,
    context: str = "",
    limit: int | None = None,
) -> list[int]:
    """Return the ids of a prompt, with what the tokenizer puts before it.

    Args:
        tokenizer: of the model.
        template: `alpaca`; `alpaca_newline`, the same and a newline (Booster's and Antidote's form); `chat`, the
            tokenizer's own, the input after the instruction after an empty line, always on one day (`TODAY`).
        instruction: the request.
        context: its input, or "".
        limit: how many ids are needed; None for all.

    Returns:
        All ids. Of a very long prompt with more than `limit` tokens only the ids of a prefix, more than `limit`.

    Raises:
        UserError: The tokenizer has no chat template, or it fails.
    """
    if template == "chat":
        # The template writes the special tokens itself.
        text = _chat_text(tokenizer, joined(instruction, context))
        return first_ids(tokenizer, text, limit, add_special_tokens=False)
    text = alpaca(instruction, context) + ("\n" if template == "alpaca_newline" else "")
    # One more id is needed, since some tokenizers end every text.
    ids = first_ids(tokenizer, text, None if limit is None else limit + 1)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _chat_text(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    """Return a user's message in the tokenizer's own chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            "model.template=chat: this tokenizer has no chat template. Fix: model.template=alpaca, or alpaca_newline"
        )
    message = {"role": "user", "content": content}
    try:
        form = tokenizer.get_chat_template()
        if "strftime_now" in form:
            form = ON_ONE_DAY + form
        options: dict[str, Any] = {"chat_template": form, "tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template([message], **options)
        if not isinstance(text, str) or (is_blank(text) and not is_blank(content)):
            raise ValueError("it produces no text")
        text.encode()
    except Exception as error:
        words = printable(first_line(error))
        words = words if len(words) <= MAX_ERROR_CHARS else f"{words[:MAX_ERROR_CHARS]}..."
        raise UserError(
            f"model.template=chat: the tokenizer's chat template fails ({words}). "
            "Fix: model.template=alpaca, or repair chat_template"
        ) from error
    return text


def joined(instruction: str, context: str) -> str:
    """Return both in one text, as a person would write them."""
    return f"{instruction}\n\n{context}" if context else instruction
