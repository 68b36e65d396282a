"""Prompt templates by name, exactly as in the papers: `encode_prompt`, and `prompt_text` for the text."""

from datetime import UTC, datetime
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from lisa_lightning.config.fields import Template
from lisa_lightning.data.normal_form import is_blank
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.runtime.errors import UserError, first_line, printable

MARKER: Final = "### Response:"
TEMPLATE_KEY: Final = "model.template"
"""Config key of the template of training."""
MAX_ERROR_CHARS: Final = 200
"""Maximum length of a template's error message in ours."""
PROMPT_DATE: Final = datetime(2024, 7, 26, tzinfo=UTC)
"""Fixed date of chat templates that write the current date, so that prompts never change. It is Llama 3's default."""
_DIRECTIVES: Final = ("%Y", "%y", "%m", "%d", "%B", "%b", "%A", "%a")
_REPLACEMENTS: Final = "".join(f" | replace('{d}', '{PROMPT_DATE.strftime(d)}')" for d in _DIRECTIVES)
STRFTIME_NOW_MACRO: Final = f"{{%- macro strftime_now(format) -%}}{{{{ format{_REPLACEMENTS} }}}}{{%- endmacro %}}"
"""Jinja macro that, prepended to a template, overrides the library's function `strftime_now`."""


def alpaca(instruction: str, context: str = "") -> str:
    """Return the Alpaca prompt with or without an input, as in Lisa and Vaccine. It ends with `### Response:`."""
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
    system: str = "",
    key: str = TEMPLATE_KEY,
) -> list[int]:
    """Return the ids of a prompt, with the tokenizer's leading special tokens.

    Args:
        tokenizer: tokenizer of the model.
        template: name of the template.

            - `alpaca`: the Alpaca prompt.
            - `alpaca_newline`: the Alpaca prompt with a newline, as in Booster and Antidote.
            - `chat`: the tokenizer's chat template with the text of `join_context`. Its date is `PROMPT_DATE`, and
              thinking is off.
        instruction: instruction of the row.
        context: input of the row, or "".
        limit: number of required ids; None for all.
        system: system prompt, or ""; see `prompt_text`.
        key: config key of the template, for errors.

    Returns:
        All ids. For a very long prompt with more than `limit` tokens the ids of a prefix, more than `limit`.

    Raises:
        UserError: if the tokenizer has no chat template, or if its template fails or takes no system prompt.
    """
    text = prompt_text(tokenizer, template, instruction, context, system, key)
    if template == "chat":
        # The template writes the special tokens itself.
        return first_ids(tokenizer, text, limit, add_special_tokens=False)
    # One more id is needed, since some tokenizers end every text.
    ids = first_ids(tokenizer, text, None if limit is None else limit + 1)
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def prompt_text(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    instruction: str,
    context: str = "",
    system: str = "",
    key: str = TEMPLATE_KEY,
) -> str:
    """Return the text of a prompt. With `template="chat"` it contains the special tokens.

    Args:
        tokenizer: tokenizer of the model, which has the chat template.
        template: name of the template; see `encode_prompt`.
        instruction: instruction of the row.
        context: input of the row, or "".
        system: system prompt, or "". A chat template receives it as the system message. For `alpaca` and
            `alpaca_newline` it precedes the text, separated by an empty line.
        key: config key of the template, for errors.

    Raises:
        UserError: if the tokenizer has no chat template, or if its template fails or takes no system prompt.
    """
    if template == "chat":
        return _chat_text(tokenizer, join_context(instruction, context), system, key)
    text = alpaca(instruction, context) + ("\n" if template == "alpaca_newline" else "")
    return f"{system}\n\n{text}" if system else text


def with_fixed_date(template: str) -> str:
    """Return a chat template that writes `PROMPT_DATE` where it would write the current date."""
    return STRFTIME_NOW_MACRO + template if "strftime_now" in template else template


def _chat_text(tokenizer: PreTrainedTokenizerBase, content: str, system: str, key: str) -> str:
    """Return a user message after a system message, if any, formatted with the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise UserError(f"{key}=chat: this tokenizer has no chat template. Fix: {key}=alpaca, or alpaca_newline")
    messages = [{"role": "user", "content": content}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        options: dict[str, Any] = {
            "chat_template": with_fixed_date(tokenizer.get_chat_template()),
            "tokenize": False,
            "add_generation_prompt": True,
            # Variable of the templates of Qwen3 and SmolLM3. Rows have no thoughts to learn from.
            "enable_thinking": False,
        }
        text = tokenizer.apply_chat_template(messages, **options)
        if not isinstance(text, str) or (is_blank(text) and not is_blank(content)):
            raise ValueError("it produces no text")
        text.encode()
    except Exception as error:
        if system:
            # A template that fails on the user message too has another problem than the system prompt.
            _chat_text(tokenizer, content, "", key)
            raise _no_system_role(key) from None
        reason = printable(first_line(error))
        reason = reason if len(reason) <= MAX_ERROR_CHARS else f"{reason[:MAX_ERROR_CHARS]}..."
        raise UserError(
            f"{key}=chat: the tokenizer's chat template fails ({reason}). Fix: {key}=alpaca, or repair chat_template"
        ) from error
    if system.strip() not in text:
        raise _no_system_role(key)
    return text


def _no_system_role(key: str) -> UserError:
    """Return the error for a chat template that rejects or drops system messages."""
    return UserError(
        f"{key}=chat: the tokenizer's chat template has no system role, so a system prompt or prefix can't be used. "
        f"Fix: {key}=alpaca, or leave out evaluate.system and evaluate.prefix, or the method that adds it"
    )


def join_context(instruction: str, context: str) -> str:
    """Return an instruction and its input as one text, separated by an empty line."""
    return f"{instruction}\n\n{context}" if context else instruction
