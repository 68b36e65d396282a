"""Suggest names for a misspelt one."""

import difflib
from collections.abc import Iterable

MAX_NAMES = 40
"""Names that fit into a message."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean A or B?`, or all names where none is close and they are few.

    Keys with dots whose last part is the same come first, since a key is often given without its section.
    """
    names = sorted(names)
    last = name.rpartition(".")[2]
    same = sorted((n for n in names if n.rpartition(".")[2] == last), key=len)
    close = [*same, *(n for n in difflib.get_close_matches(name, names, n=3, cutoff=0.5) if n not in same)][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    if len(names) > MAX_NAMES:
        return "`python run.py --help` lists the keys"
    return f"allowed: {', '.join(names)}" if names else "it takes none"
