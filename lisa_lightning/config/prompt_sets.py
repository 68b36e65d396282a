"""Named prompt sets in `source.harmful_prompts` and `source.harmless_prompts`. Start at `split_source`."""

import re
from collections.abc import Mapping
from typing import Any, Final

from lisa_lightning.config.rules import LOCAL_SET_KEYS, SET_RULES, not_allowed, quoted
from lisa_lightning.config.suggest import suggest
from lisa_lightning.runtime.errors import UserError, printable

PROMPTS: Final = ("harmful_prompts", "harmless_prompts")
"""Sets of a source that may consist of several named sets."""
ORIGIN_KEYS: Final = ("path", "hub", "config", "split", "revision", "files", "rows")
"""Keys that identify the rows of one file or hub data set, so that another file or data set does not inherit them."""
SET_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
MISSING: Final = "???"
"""Value of a key that has to be set."""


def split_source(source: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the sets of a source by their key below `source`. The key of a named set is `SET.NAME`.

    Keys next to the names are defaults of all named sets. A set with its own path or hub id inherits none of
    ORIGIN_KEYS.

    Args:
        source: section `source`, resolved.
    """
    sets: dict[str, Mapping[str, Any]] = {}
    for section, entry in source.items():
        names = set_names(entry) if section in PROMPTS else []
        sets |= {f"{section}.{name}": _with_defaults(entry, name) for name in names} or {section: entry}
    return sets


def set_names(entry: Any) -> list[Any]:
    """Return the names of the sets in an entry of `source`; [] for a single set, or if it is not a mapping."""
    return [key for key in entry if key not in SET_RULES] if isinstance(entry, Mapping) else []


def check_prompt_sets(source: Mapping[str, Any]) -> None:
    """Check every key and value of the named sets.

    Args:
        source: section `source`, resolved. A key without a value has the value MISSING.

    Raises:
        UserError: if a set has an unusable name, is empty or names no rows; if a key is unknown or has a wrong value.
    """
    for section in PROMPTS:
        for name in set_names(source[section]):
            _check_name(f"source.{section}", name, source[section][name])
            _check_set(f"source.{section}.{name}", source[section][name], _with_defaults(source[section], name))


def _with_defaults(entry: Mapping[Any, Any], name: Any) -> dict[str, Any]:
    """Return a named set with the keys that it inherits."""
    named_set = entry[name]
    has_origin = named_set.get("path") is not None or named_set.get("hub") is not None
    excluded = ORIGIN_KEYS if has_origin else ()
    return {key: value for key, value in entry.items() if key in SET_RULES and key not in excluded} | dict(named_set)


def _check_name(section: str, name: Any, named_set: Any) -> None:
    """Raise UserError for an unusable name, or if a named set is empty or no mapping."""
    # YAML reads a name of digits as a number.
    if isinstance(name, bool) or not isinstance(name, str | int) or SET_NAME.fullmatch(str(name)) is None:
        shown = printable(str(name))[:80]
        raise UserError(
            f"{section}: '{shown}' can't be the name of a set. Fix: use letters, digits, underscores and hyphens"
        )
    if not isinstance(named_set, Mapping):
        raise UserError(
            f"{section}.{name}={quoted(named_set)}: this is not a key of a set ({suggest(str(name), SET_RULES)}), and "
            f"a named set must be a mapping. Fix: {section}.{name}.path=FILE"
        )
    if not named_set:
        raise UserError(f"{section}.{name}={{}}: the set is empty. Fix: {section}.{name}.path=FILE")


def _check_set(key: str, named_set: Mapping[str, Any], complete: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown key or a wrong value of a named set, or if it names no rows.

    Args:
        key: config key of the set.
        named_set: the keys of the set itself.
        complete: the same with inherited keys.
    """
    for name, value in named_set.items():
        if name not in SET_RULES:
            raise UserError(
                f"{key}.{printable(str(name))} is not a key of a set, and {key.rpartition('.')[2]} is read as the name "
                f"of one; {suggest(str(name), SET_RULES)}"
            )
        is_allowed, allowed = SET_RULES[name]
        if not is_allowed(value):
            raise not_allowed(f"{key}.{name}", value, allowed)
    if complete.get("path") == MISSING:
        raise UserError(f"{key}.path has no value. Fix: set {key}.path=...")
    if complete.get("hub") is not None:
        return
    if complete.get("path") is None:
        raise not_allowed(f"{key}.path", None, "the path of a file")
    if hub_keys := [name for name, value in named_set.items() if name not in LOCAL_SET_KEYS and value is not None]:
        raise UserError(f"{key}.{hub_keys[0]}: only a hub data set has this key. Fix: set {key}.hub, or leave it out")
