"""`UserError`, which is shown without a traceback, and `printable`, which cleans quoted text."""

import re
import unicodedata

UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories of characters that change how a terminal shows a text."""


class UserError(Exception):
    """Error that the user can fix: a wrong value, bad data or a full disk. The exit status is 2."""


class NotFiniteError(UserError):
    """Error for a loss or a gradient that is infinite or NaN."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text that is not blank, or the name of the exception."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def printable(text: str) -> str:
    """Return `text` on one line, without characters that a terminal would execute or reorder.

    These characters become blanks:
        - control characters (Unicode category Cc)
        - format characters such as bidirectional overrides (Cf)
        - line and paragraph separators (Zl, Zp)
        - lone surrogates (Cs)

    Every text from a server, a model name or a foreign file is cleaned so before it is printed or logged.
    """
    cleaned = (char if unicodedata.category(char) not in UNPRINTABLE else " " for char in text)
    return re.sub(r" {2,}", " ", "".join(cleaned)).strip()
