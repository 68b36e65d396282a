"""Strict parsing of the JSON lines of a run, which rejects every damaged line. Start at `parse_lines`."""

import json
import re
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Final, NamedTuple

from lisa_lightning.runtime.errors import UserError, first_line, printable

MAX_SHOWN_CHARS: Final = 40
"""Maximum number of characters of a wrong value in a message."""
SCORE_TOLERANCE: Final = 1e-6
"""Tolerance for probabilities in single precision, which may exceed the range from 0 to 1."""


class Check(NamedTuple):
    """Check of one field of a line."""

    allowed: str
    """Description of the values that pass, for messages."""
    passes: Callable[[Any], bool]
    may_be_missing: bool = False
    """True for a field that files of earlier versions lack."""


SURROGATE: Final = re.compile("[\ud800-\udfff]")
Schema = Mapping[str, Check]
"""Name of every field of a line -> check of its value."""


def one_of(*values: str) -> Check:
    """Return a check that passes these words."""
    return Check(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def _is_text(value: Any) -> bool:
    """Return True for a text that can be written: half a surrogate pair is valid in JSON, but not in UTF-8."""
    return isinstance(value, str) and (value.isascii() or not SURROGATE.search(value))


def _is_score(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and isfinite(value) and -SCORE_TOLERANCE <= value <= 1 + SCORE_TOLERANCE


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
    """Line that violates its schema; the message describes the first problem."""


def parse_line(line: bytes, schema: Schema) -> dict[str, Any]:
    """Return the JSON object of a line.

    Args:
        line: the line without its end.
        schema: the fields of the object.

    Raises:
        DamagedLine: if the line is no JSON object of this schema.
    """
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_unique_fields)
    except DamagedLine:
        raise
    except UnicodeDecodeError as error:
        raise DamagedLine("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DamagedLine(f"broken JSON ({_shortened(first_line(error))})") from error
    if not isinstance(value, dict):
        raise DamagedLine("not a JSON object")
    if (fault := find_fault(value, schema)) is not None:
        raise DamagedLine(fault)
    return value


def find_fault(values: Mapping[str, Any], schema: Schema) -> str | None:
    """Return a description of the first field that is missing, unknown or has a wrong value; None if all are valid."""
    if missing := [name for name, check in schema.items() if name not in values and not check.may_be_missing]:
        return f"field '{missing[0]}' is missing"
    if unknown := [name for name in values if name not in schema]:
        return f"field '{_shortened(unknown[0])}' is unknown"
    wrong = [name for name, value in values.items() if not schema[name].passes(value)]
    if not wrong:
        return None
    return f"{wrong[0]}={_shortened(_as_json(values[wrong[0]]))} is not {schema[wrong[0]].allowed}"


def read_stored_bytes(path: Path, fix: str) -> bytes:
    """Return the content of a file, b"" if it does not exist.

    Args:
        path: the file.
        fix: end of the error message.

    Raises:
        UserError: if the path is no regular file or can't be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: it is {'a folder' if path.is_dir() else 'no regular file'}. Fix: {fix}")
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}). Fix: {fix}") from error


def parse_lines(path: Path, lines: list[bytes], schema: Schema, fix: str) -> list[dict[str, Any]]:
    """Return the objects of a file's lines.

    Args:
        path: the file, for the message.
        lines: its lines without their ends.
        schema: the fields of each object.
        fix: end of the error message.

    Raises:
        UserError: if a line is damaged; the message has its number.
    """
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(parse_line(line, schema))
        except DamagedLine as error:
            raise UserError(f"{path}, line {number}: {error}. Fix: {fix}") from error
    return objects


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise DamagedLine("a field occurs twice")
    return values


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=repr)


def _shortened(text: str) -> str:
    """Return a text that is safe to print, truncated to the maximum length."""
    text = printable(text)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
