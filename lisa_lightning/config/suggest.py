"""Suggestions for misspelt names. Start at `suggest`."""

import difflib
from collections.abc import Iterable

from lisa_lightning.config.paths import COMMAND

MAX_LISTED_NAMES = 40
"""Maximum number of names in a message."""


def suggest(name: str, names: Iterable[str]) -> str:
    """Return `did you mean A or B?` for an unknown name.

    Keys with the same last part come first, because the section of a key is often left out.

    Args:
        name: the unknown name or key.
        names: the allowed ones.

    Returns:
        The similar names. Without any, all names if they are few, else a hint at `--help`.
    """
    names = sorted(names)
    last_part = name.rpartition(".")[2]
    same_key = sorted((n for n in names if n.rpartition(".")[2] == last_part), key=len)
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    matches = [*same_key, *(n for n in similar if n not in same_key)][:3]
    if matches:
        return f"did you mean {' or '.join(matches)}?"
    if len(names) > MAX_LISTED_NAMES:
        return f"`{COMMAND} --help` lists the keys"
    return f"allowed: {', '.join(names)}" if names else "it takes none"
