"""Read the lines of JSON that a run has stored, and refuse every line that the run can't have written."""

import json
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

from lisa_lightning.runtime.errors import UserError, first_line, printable

SHOWN: Final = 40
"""Characters of a wrong value that a message quotes."""
ROUNDING: Final = 1e-6
"""Tolerance for probabilities in single precision, which may exceed the range from 0 to 1."""


class Check(NamedTuple):
    """A test of one field of a line."""

    allowed: str
    """The values that pass, for messages."""
    passes: Callable[[Any], bool]


Form = Mapping[str, Check]
"""Every field of a line -> the check of its value."""


def one_of(*values: str) -> Check:
    """Return the check for one of a few words."""
    return Check(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _is_text(value: Any) -> bool:
    """Return whether the value is a text that can be written: JSON can hold half a character, UTF-8 can't."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_score(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and -ROUNDING <= value <= 1 + ROUNDING


def _are_flags(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_text(k) and isinstance(v, bool) for k, v in value.items())


TEXT: Final = Check("a text", _is_text)
FLAG: Final = Check("true or false", lambda value: isinstance(value, bool))
OPTIONAL_FLAG: Final = Check("true, false or null", lambda value: value is None or isinstance(value, bool))
FLAGS: Final = Check("an object of true and false", _are_flags)
SCORE: Final = Check("a number from 0 to 1", _is_score)
INDEX: Final = Check("a whole number from 0 on", lambda value: type(value) is int and value >= 0)
KIND: Final = one_of("harmful", "harmless", "task")


class DamagedLine(ValueError):
    """A line that holds something else than its form; the text says what."""


def parsed(line: bytes, form: Form) -> dict[str, Any]:
    """Return the object of a line that has exactly the fields of a form, with values that pass their checks.

    Raises:
        DamagedLine: if it isn't such a line.
    """
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_without_repetition)
    except DamagedLine:
        raise
    except UnicodeDecodeError as error:
        raise DamagedLine("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DamagedLine(f"broken JSON ({_shown(first_line(error))})") from error
    if not isinstance(value, dict):
        raise DamagedLine("not a JSON object")
    if (fault := fault_in(value, form)) is not None:
        raise DamagedLine(fault)
    return value


def fault_in(values: Mapping[str, Any], form: Form) -> str | None:
    """Return the first field that is missing, unknown or has a wrong value, as a sentence; None if there is none."""
    if missing := [name for name in form if name not in values]:
        return f"field '{missing[0]}' is missing"
    if unknown := [name for name in values if name not in form]:
        return f"field '{_shown(unknown[0])}' is unknown"
    wrong = [name for name, check in form.items() if not check.passes(values[name])]
    if not wrong:
        return None
    return f"{wrong[0]}={_shown(_as_json(values[wrong[0]]))} is not {form[wrong[0]].allowed}"


def stored_bytes(path: Path, fix: str) -> bytes:
    """Return what a file holds, nothing where there is none.

    Raises:
        UserError: if it is no regular file or can't be read; the message ends with the fix.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: it is {'a folder' if path.is_dir() else 'no regular file'}. Fix: {fix}")
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}). Fix: {fix}") from error


def parsed_lines(path: Path, lines: list[bytes], form: Form, fix: str) -> list[dict[str, Any]]:
    """Return the objects of a file's lines.

    Raises:
        UserError: if a line is damaged, with its number and the fix.
    """
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(parsed(line, form))
        except DamagedLine as error:
            raise UserError(f"{path}, line {number}: {error}. Fix: {fix}") from error
    return objects


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise DamagedLine("a field stands twice")
    return values


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def _shown(text: str) -> str:
    """Return a text short enough and safe to print."""
    text = printable(text)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
