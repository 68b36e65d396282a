"""Arguments of the command before Hydra parses them: `prepared` quotes paths and refuses what can't be meant."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lisa_lightning.config.paths import CONF
from lisa_lightning.config.rules import ENDPOINT, PRIVATE, not_allowed
from lisa_lightning.runtime.errors import UserError, first_line, printable

WITH_VALUE: Final = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p")
"""Hydra's flags that another argument belongs to."""
PATHS: Final = re.compile(r"\+{0,2}(hydra\.(run|sweep)\.(sub)?dir|cache_dir|responses)")
"""Keys whose values are one path each, which need not exist: `=` and `,` in it mean nothing but themselves."""
SETS_OF_PATHS: Final = re.compile(r"\+{0,2}[\w.]+\.(path|id)")
"""Keys whose values may be paths, of which a sweep takes several."""
MAX_GROUP: Final = 100
"""Characters of a group's name; a file system refuses to look up much longer ones."""
INSTEAD_OF_NULL: Final = {
    "method": "method=sft fine-tunes without a defense",
    "experiment": "leave it out, or name one",
    "sweep": "leave it out",
    "judge": "set stages=[align,finetune,evaluate] to judge nothing",
}
"""Config group -> what people mean by GROUP=null, where it has no option `none`."""


def prepared(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command in a form that Hydra parses as their writer means them.

    A value that is a path is quoted where Hydra would read `=`, `,` or other characters in it as grammar. Names of a
    sweep's folders contain such characters.

    Raises:
        UserError: if an argument can't be parsed; a config group is null or a number; an address holds a password.
    """
    parser = OverridesParser.create()
    overrides = set(override_indices(arguments))
    return [_prepared(parser, a) if i in overrides else a for i, a in enumerate(arguments)]


def override_indices(arguments: Sequence[str]) -> Iterator[int]:
    """Yield the places of the arguments that are overrides rather than flags, or values of flags."""
    for index, argument in enumerate(arguments):
        after_flag = index > 0 and arguments[index - 1] in WITH_VALUE
        if not after_flag and not argument.startswith("-"):
            yield index


def _prepared(parser: OverridesParser, argument: str) -> str:
    key, equals, value = argument.partition("=")
    _refuse_password(key, value)
    try:
        override = parser.parse_override(argument)
        # A folder may have a number for a name, and most numbers are no folders: only keys of paths take it as one.
        if not (_changes_path(key, value, override) or (override.is_sweep_override() and _exists(value))):
            _refuse_no_name(override)
            return argument
    except (HydraException, RecursionError) as error:
        of_path = PATHS.fullmatch(key) or SETS_OF_PATHS.fullmatch(key)
        if not (equals and (_exists(value) or (of_path and "/" in value and not value.startswith(("'", '"'))))):
            raise _unparsable(argument, error) from error
    # Hydra reads backslashes as escapes where they stand before a quotation mark.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return f"{key}='{escaped}'"


def _changes_path(key: str, value: str, override: Override) -> bool:
    """Return whether Hydra reads a path as something else, unless its quotation or an interpolation is meant."""
    return _takes_path(key, value) and override.value() != value and "${" not in value


def _takes_path(key: str, value: str) -> bool:
    """Return whether the value must be a path: that of a key that takes nothing else, and not quoted already."""
    if value.startswith(("'", '"')):
        return False
    if PATHS.fullmatch(key):
        return "/" in value or _exists(value)
    return SETS_OF_PATHS.fullmatch(key) is not None and _exists(value)


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _unparsable(argument: str, error: Exception) -> UserError:
    shown = printable(argument)[:120]
    if "=" not in argument and not argument.startswith("~"):
        return UserError(
            f"{shown}: an argument must be KEY=VALUE or GROUP=NAME. A shell splits at blanks. Fix: write no blank "
            "after `=`, or quote the whole argument: 'judge=[embedded, refusal]'"
        )
    key = shown.partition("=")[0]
    reason = printable(first_line(error))[:120]
    return UserError(
        f"{shown}: it can't be parsed ({reason}). A shell splits at blanks, and Hydra reads = , ( ) [ ] {{ }} as "
        f"grammar. Fix: quote the whole argument, '{key}=[A, B]', or the value inside it, \"{key}='...'\""
    )


def _refuse_no_name(override: Override) -> None:
    """Raise UserError where a config group is set to something that can't be the name of an option."""
    group = str(override.key_or_group)
    if override.is_delete() or not (group.startswith("hydra/") or _is_group(group)):
        return
    value: Any = override.value()
    # A glob over names has no list.
    names = getattr(value, "list", []) if override.is_sweep_override() else [value]
    if all(_is_name(getattr(name, "text", name)) for name in names):
        return
    has_none = (CONF / group / "none.yaml").exists()
    fix = f"{group}=none" if has_none else INSTEAD_OF_NULL.get(group, f"name a file of conf/{group}, or leave it out")
    raise UserError(f"{override.input_line}: {group} takes the name of an option. Fix: {fix}")


def _is_group(name: str) -> bool:
    return re.fullmatch(r"\w+(/\w+)*", name) is not None and len(name) < MAX_GROUP and (CONF / name).is_dir()


def _is_name(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) and name for name in value)
    return isinstance(value, str) and value != ""


def _refuse_password(key: str, value: str) -> None:
    """Raise UserError for an address with a password, which Hydra would write into folders and files."""
    if key.endswith(".base_url") and set(value) & set(PRIVATE):
        raise not_allowed(key, value, ENDPOINT["base_url"][1])
