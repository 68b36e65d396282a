"""Token ids of the start of a text, of which no more is tokenized than is needed."""

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    # Judges import this module before it is known whether one runs, and transformers takes seconds.
    from transformers import PreTrainedTokenizerBase

SHORT_TEXT: Final = 65_536
"""Characters up to which a text is tokenized whole."""
CHARACTERS_A_TOKEN: Final = 64
"""A prefix has this many characters for every token that is needed, which most texts need a tenth of."""
MARGIN: Final = 64
"""Tokens at the end of a prefix that the characters after it may change."""
WHITE_SPACE: Final = (" ", "\n", "\t")


def first_ids(tokenizer: "PreTrainedTokenizerBase", text: str, limit: int | None, **options: Any) -> list[int]:
    """Return the token ids of a text, or of a prefix that has at least `limit` of them.

    The first `limit` ids are those of the whole text. A text of 10 MB would otherwise take gigabytes to tokenize.

    Args:
        tokenizer: of the model.
        text: text of any length.
        limit: how many ids are needed; None for all.
        options: passed to the tokenizer.

    Returns:
        All ids if the text is short or has at most `limit` of them; otherwise more than `limit`.
    """
    size = len(text) if limit is None else max(SHORT_TEXT, CHARACTERS_A_TOKEN * limit)
    while limit is not None and size < len(text):
        ids = tokenizer(text[: _boundary(text, size)], **options)["input_ids"]
        if len(ids) >= limit + MARGIN:
            return ids
        size *= 2
    return tokenizer(text, **options)["input_ids"]


def _boundary(text: str, size: int) -> int:
    """Return the last white space in the second half of a prefix, or its end if there is none."""
    boundary = max(text.rfind(space, size // 2, size) for space in WHITE_SPACE)
    return boundary if boundary > 0 else size
