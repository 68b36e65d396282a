"""`UserError`, whose message a person sees instead of a traceback, and what it quotes of others' texts."""

import re
import unicodedata

UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that change how a terminal shows a text."""


class UserError(Exception):
    """Something the user can put right: a wrong value, bad data, a full disk. Ends with exit status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something; the exception's name where none does."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """Return `text` on one line, without characters that a terminal would execute or reorder.

    Control characters (Unicode category Cc), unassigned format characters such as bidirectional overrides (Cf), line
    separators and lone surrogates become blanks. Texts of servers, model names and other people's files pass through
    this function before they are printed or logged.
    """
    harmless = (char if unicodedata.category(char) not in UNPRINTABLE else " " for char in text)
    return re.sub(r" {2,}", " ", "".join(harmless)).strip()
