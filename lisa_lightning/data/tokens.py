"""Tokenize long texts only as far as needed: `first_ids`."""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    # Judges import this module before it is known whether one runs, and transformers takes seconds.
    from transformers import PreTrainedTokenizerBase

SHORT_TEXT_CHARS: Final = 65_536
"""Characters up to which a text is tokenized completely."""
PREFIX_CHARS_PER_TOKEN: Final = 64
"""Characters of a prefix for every required token, about ten times as many as most texts need."""
MARGIN_TOKENS: Final = 64
"""Tokens at the end of a prefix that the text after it may change."""
WHITE_SPACE: Final = (" ", "\n", "\t")


def first_ids(tokenizer: "PreTrainedTokenizerBase", text: str, limit: int | None, **options: Any) -> list[int]:
    """Return the token ids of a text, or of a prefix with at least `limit` tokens.

    The first `limit` ids equal those of the full text. Tokenizing a full text of 10 MB would take gigabytes.

    Args:
        tokenizer: tokenizer of the model.
        text: text of any length.
        limit: number of required ids; None for all.
        options: keyword arguments of the tokenizer.

    Returns:
        All ids if the text is short or has at most `limit` tokens, otherwise the ids of a prefix, more than `limit`.
    """
    size = len(text) if limit is None else max(SHORT_TEXT_CHARS, PREFIX_CHARS_PER_TOKEN * limit)
    while limit is not None and size < len(text):
        ids = tokenizer(text[: _boundary(text, size)], **options)["input_ids"]
        if len(ids) >= limit + MARGIN_TOKENS:
            return ids
        size *= 2
    return tokenizer(text, **options)["input_ids"]


def _boundary(text: str, size: int) -> int:
    """Return the last white space in the second half of a prefix, or its end without any."""
    boundary = max(text.rfind(space, size // 2, size) for space in WHITE_SPACE)
    return boundary if boundary > 0 else size
