"""Checks of the command's arguments before Hydra parses them. Start at `prepare_arguments`, which also quotes paths."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lisa_lightning.config.fields import PRIVATE_CHARACTERS, PublicUrl, describe
from lisa_lightning.config.paths import CONF
from lisa_lightning.config.rules import not_allowed
from lisa_lightning.runtime.errors import UserError, first_line, printable

FLAGS_WITH_VALUE: Final = (
    *("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    *("--cfg", "-c", "--info", "-i"),
)
"""Hydra's flags that take the next argument as their value."""
PATH_KEYS: Final = re.compile(r"\+{0,2}(hydra\.(run|sweep)\.(sub)?dir|cache_dir|responses)")
"""Keys whose value is a single path, which need not exist. `=` and `,` are characters of the path."""
SWEEPABLE_PATH_KEYS: Final = re.compile(r"\+{0,2}([\w.-]+\.(path|id)|adapter|aligned)")
"""Keys whose value may be a path. A sweep may list several."""
TEXT_KEYS: Final = re.compile(r"\+{0,2}(engine\.command|evaluate\.(system|prefix|prefill))")
"""Keys whose value is a text of which Hydra would misread commas and braces."""
NAMED_SETS: Final = re.compile(r"source\.harm(ful|less)_prompts(=\{|\.(?!(columns|labels|where)\b)[\w-]+(\.\w|=\{))")
"""Start of an override that may name a new prompt set, which Hydra adds with `++` only."""
MAX_GROUP_CHARS: Final = 100
"""Maximum number of characters of a group's name. File systems reject much longer names."""
NULL_ALTERNATIVES: Final = {
    "method": "method=sft fine-tunes without a defense",
    "experiment": "leave it out, or name one",
    "sweep": "leave it out",
    "judge": "set stages=[align,finetune,evaluate] to judge nothing",
}
"""Config group without an option `none` -> the fix for GROUP=null."""


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with those paths and texts quoted that Hydra would misread, and `++` before named sets.

    Hydra parses `=`, `,` and other characters of a path as grammar. Names of a sweep's folders contain them. Commands
    and sentences contain commas and braces.

    Args:
        arguments: overrides and flags of the command.

    Raises:
        UserError: if an argument can't be parsed; a config group is null or a number; a URL contains a password;
            `lora=null` comes with keys of an adapter.
    """
    _refuse_keys_of_no_adapter([arguments[i] for i in override_indices(arguments)])
    parser = OverridesParser.create()
    indices = set(override_indices(arguments))
    prepared = [_prepare(parser, argument) if i in indices else argument for i, argument in enumerate(arguments)]
    return [f"++{argument}" if NAMED_SETS.match(argument) else argument for argument in prepared]


def _refuse_keys_of_no_adapter(overrides: Sequence[str]) -> None:
    """Raise UserError for `lora=null` next to `lora.KEY=VALUE`, one of which Hydra would drop."""
    keys = [override for override in overrides if override.startswith("lora.")]
    if "lora=null" in overrides and keys:
        raise UserError(
            f"lora=null {printable(keys[0])[:80]}: the first trains all weights, and the second is of an adapter. "
            "Fix: leave one of them out"
        )


def override_indices(arguments: Sequence[str]) -> Iterator[int]:
    """Yield the indices of the overrides, which are neither flags nor values of flags."""
    for index, argument in enumerate(arguments):
        after_flag = index > 0 and arguments[index - 1] in FLAGS_WITH_VALUE
        if not after_flag and not argument.startswith("-"):
            yield index


def _prepare(parser: OverridesParser, argument: str) -> str:
    key, equals, value = argument.partition("=")
    _refuse_password(key, value)
    try:
        override = parser.parse_override(argument)
        # A folder may be named by a number. Only path keys read a number as a path.
        is_misread = _is_misread_path(key, value, override) or _is_misread_text(key, value, override)
        if not (is_misread or (override.is_sweep_override() and _exists(value))):
            _refuse_invalid_option(override)
            return argument
    except (HydraException, RecursionError) as error:
        is_path_key = PATH_KEYS.fullmatch(key) or SWEEPABLE_PATH_KEYS.fullmatch(key)
        is_text = TEXT_KEYS.fullmatch(key) or (is_path_key and "/" in value)
        if not (equals and (_exists(value) or (is_text and not value.startswith(("'", '"'))))):
            raise _parse_error(argument, error) from error
    # Hydra reads backslashes before a quotation mark as escapes.
    escaped = re.sub(r"(\\*)('|$)", lambda match: 2 * match[1] + ("\\'" if match[2] else ""), value)
    return f"{key}='{escaped}'"


def _is_misread_path(key: str, value: str, override: Override) -> bool:
    """Return whether Hydra would parse a path as another value. Quoted values and interpolations are intended."""
    return _must_be_path(key, value) and override.value() != value and "${" not in value


def _is_misread_text(key: str, value: str, override: Override) -> bool:
    """Return whether Hydra would parse a text with a comma as values of a sweep. Lists of quoted texts are intended."""
    return TEXT_KEYS.fullmatch(key) is not None and override.is_sweep_override() and not re.search("['\"(]", value)


def _must_be_path(key: str, value: str) -> bool:
    """Return whether an unquoted value must be a path, judged by its key."""
    if value.startswith(("'", '"')):
        return False
    if PATH_KEYS.fullmatch(key):
        return "/" in value or _exists(value)
    return SWEEPABLE_PATH_KEYS.fullmatch(key) is not None and _exists(value)


def _exists(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False


def _parse_error(argument: str, error: Exception) -> UserError:
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


def _refuse_invalid_option(override: Override) -> None:
    """Raise UserError if a config group is set to a value that can't be the name of an option."""
    group = str(override.key_or_group)
    if override.is_delete() or not (group.startswith("hydra/") or _is_group(group)):
        return
    value: Any = override.value()
    # A sweep over a glob has no list.
    names = getattr(value, "list", []) if override.is_sweep_override() else [value]
    if all(_is_option_name(getattr(name, "text", name)) for name in names):
        return
    has_none = (CONF / group / "none.yaml").exists()
    fix = f"{group}=none" if has_none else NULL_ALTERNATIVES.get(group, f"name a file of conf/{group}, or leave it out")
    raise UserError(f"{override.input_line}: {group} takes the name of an option. Fix: {fix}")


def _is_group(name: str) -> bool:
    return re.fullmatch(r"\w+(/\w+)*", name) is not None and len(name) < MAX_GROUP_CHARS and (CONF / name).is_dir()


def _is_option_name(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) and name for name in value)
    return isinstance(value, str) and value != ""


def _refuse_password(key: str, value: str) -> None:
    """Raise UserError for a URL with a password. Hydra would write it into folder names and files."""
    if key.endswith(".base_url") and set(value) & set(PRIVATE_CHARACTERS):
        raise not_allowed(key, value, describe(PublicUrl | None))
