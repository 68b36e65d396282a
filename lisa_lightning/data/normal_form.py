"""Normal forms of texts and cells, by which prompts, labels and column names are compared: `normal_text`."""

import re
import unicodedata
from typing import Any, Final

_INVISIBLE: Final = (
    r"\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    r"\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
"""Characters without a glyph, except white space: controls, zero-width and format characters, fillers.

Cells may be in any script, so this set is larger than the other sets of invisible characters in this package.
"""
INVISIBLE: Final = re.compile(f"[{_INVISIBLE}]+")
VISIBLE: Final = re.compile(rf"[^\s{_INVISIBLE}]")
NUMBER: Final = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>0|[1-9][0-9]*)?(?:\.(?P<fraction>[0-9]*))?(?:e(?P<exponent>[+-]?[0-9]{1,4}))?"
)
"""Decimal number in lower case. It does not match text with leading zeros, such as a postal code."""
_MAX_PLAIN_DIGITS: Final = 30
"""Number of digits up to which an integer is written without an exponent."""


def normal_text(text: str) -> str:
    """Return the normal form of a text.

    Two texts have the same normal form if they differ only in:

    - case;
    - Unicode normalization (NFC, NFD, NFKC, NFKD);
    - kind and amount of white space;
    - invisible characters.
    """
    if text.isascii():
        folded = " ".join(text.lower().split())
        if folded.isprintable():
            return folded
    visible = INVISIBLE.sub("", text)
    # Unicode's "compatibility caseless match" (section 3.13, definition D146).
    folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFD", visible).casefold()).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def normal_value(value: Any) -> str | None:
    """Return the normal form of a cell or a config value; None for null.

    All spellings of a number have one normal form: 1, 1.0, "1.00", "1e0" and Decimal(1) become "1". True and False
    become "true" and "false", not 1 and 0. Any other value becomes the normal form of its text.
    """
    if value is None:
        return None
    text = normal_text(str(value))
    return _normal_number(text) or text


def is_blank(text: str) -> bool:
    """Return whether `text` has only white space and invisible characters."""
    return VISIBLE.search(text) is None


def _normal_number(text: str) -> str | None:
    """Return one spelling for all spellings of a number, exact at any length; None if `text` is not a number."""
    match = NUMBER.fullmatch(text)
    if match is None or not (match["whole"] or match["fraction"]):
        return None
    fraction = match["fraction"] or ""
    digits = ((match["whole"] or "") + fraction).lstrip("0")
    significant = digits.rstrip("0")
    if not significant:
        return "0"
    exponent = int(match["exponent"] or 0) - len(fraction) + len(digits) - len(significant)
    sign = "-" if match["sign"] == "-" else ""
    if exponent >= 0 and len(significant) + exponent <= _MAX_PLAIN_DIGITS:
        return sign + significant + "0" * exponent
    return f"{sign}{significant}e{exponent}"
