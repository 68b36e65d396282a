"""Names that a misspelt one may stand for."""

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean A or B?`, or all names where none is close.

    Keys with dots whose last part is the same come first, since a key is often given without its section.
    """
    names = sorted(names)
    last = name.rpartition(".")[2]
    same = sorted((n for n in names if n.rpartition(".")[2] == last), key=len)
    close = [*same, *(n for n in difflib.get_close_matches(name, names, n=3, cutoff=0.5) if n not in same)][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"allowed: {', '.join(names)}" if names else "it takes none"
