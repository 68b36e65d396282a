"""Read rows of JSON and JSON Lines files with any suffix: `json_rows`."""

import json
import re
from collections.abc import Iterator
from typing import Any, Final

from lisa_lightning.data.reading import Record
from lisa_lightning.runtime.errors import UserError, printable

VISIBLE: Final = re.compile(r"\S")
SPACE: Final = re.compile(r"[ \t\r\n]*")
NESTING: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
LONG_INTEGER: Final = re.compile(r"\d{4301}")
"""Integer with more digits than Python converts."""
FIX_LAYOUT: Final = "Fix: write one object a line, or one list of objects"


class _DuplicateName(dict[str, Any]):
    """JSON object with two values of the same name, one of which is lost."""

    name: str


def json_rows(text: str, name: str, kind: str) -> Iterator[tuple[str, Record]]:
    """Yield every row of a JSON or JSON Lines file with its position.

    A file holds one object per line, a list of objects, or an object of columns. An object with a value that is not a
    list is one row.

    Args:
        text: the file's text, which is not blank.
        name: the file, for errors.
        kind: ".json", or the suffix of a JSON Lines file.

    Raises:
        UserError: if a value is broken, nested too deeply or not an object. Also if an integer is too long, or if an
            object has two values of the same name.
    """
    if _has_value_per_line(text, kind):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                position = f"line {number}"
                yield position, _record(_only_value(line, name, number), name, position)
    elif text.lstrip().startswith("["):
        yield from _elements(text, name)
    else:
        yield from _columns(_only_value(text, name, 1), name)


def _has_value_per_line(text: str, kind: str) -> bool:
    """Return whether the lines hold separate values, not parts of one value."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n", start)
    is_list = text[start] == "["
    if end < 0 or VISIBLE.search(text, end) is None:
        return kind != ".json" and not is_list
    if _is_complete(text[start:end]):
        return True
    # A broken first line of JSON Lines should be reported as that line.
    return kind != ".json" and not is_list and not _is_complete(text)


def _is_complete(text: str) -> bool:
    """Return whether a text is one JSON value, perhaps one that Python cannot represent."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (RecursionError, ValueError):
        return True
    return True


def _elements(text: str, name: str) -> Iterator[tuple[str, Record]]:
    """Yield the objects of a list. They are parsed one by one, so that errors name a line."""
    index = _skip_space(text, text.index("[") + 1)
    number, line, line_index = 0, 1, 0
    is_last = text[index : index + 1] == "]"
    while not is_last:
        number, line, line_index = number + 1, line + text.count("\n", line_index, index), index
        value, index = _value(text, index, name, 1)
        position = f"line {line}, row {number}"
        yield position, _record(value, name, position)
        index = _skip_space(text, index)
        is_last = text[index : index + 1] == "]"
        if not is_last and text[index : index + 1] != ",":
            raise _broken(json.JSONDecodeError("Expecting ',' delimiter", text, index), name, 1)
        index = index if is_last else _skip_space(text, index + 1)
    index = _skip_space(text, index + 1)
    if index < len(text):
        raise _broken(json.JSONDecodeError("Extra data", text, index), name, 1)


def _columns(value: Any, name: str) -> Iterator[tuple[str, Record]]:
    """Yield the rows of an object of columns. Empty columns are ignored."""
    record = _record(value, name, "line 1") if isinstance(value, dict) else {}
    if not all(isinstance(cells, list) for cells in record.values()):
        yield "line 1", record
        return
    columns = {column: cells for column, cells in record.items() if cells}
    if len({len(cells) for cells in columns.values()}) != 1:
        raise UserError(
            f"{name}, line 1: a JSON file must hold a list of objects, an object a line, or an object of columns "
            f"of one length. {FIX_LAYOUT}"
        )
    for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
        yield f"row {number}", dict(zip(columns, cells, strict=True))


def _record(value: Any, name: str, position: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{name}, {position}: not a JSON object but {_kind(value)}. {FIX_LAYOUT}")
    if isinstance(value, _DuplicateName):
        raise UserError(f"{name}, {position}: two columns are called '{printable(value.name)[:40]}'. Fix: delete one")
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _only_value(text: str, name: str, line: int) -> Any:
    """Return the value of a text that holds one value."""
    value, index = _value(text, _skip_space(text, 0), name, line)
    index = _skip_space(text, index)
    if index < len(text):
        raise _broken(json.JSONDecodeError("Extra data", text, index), name, line)
    return value


def _value(text: str, index: int, name: str, line: int) -> tuple[Any, int]:
    """Return the value that begins at an index, and the index after it; `line` is the number of the first line."""
    try:
        return _DECODER.raw_decode(text, index)
    except json.JSONDecodeError as error:
        raise _broken(error, name, line) from error
    except RecursionError as error:
        line += text.count("\n", 0, _deepest(text, index))
        raise UserError(f"{name}, line {line}: JSON nested too deeply. Fix: write each cell as a text") from error
    except ValueError as error:
        match = LONG_INTEGER.search(text, index)
        line += text.count("\n", 0, match.start() if match else index)
        raise UserError(
            f"{name}, line {line}: a number of more than 4300 digits. Fix: write it as a text in quotes"
        ) from error


def _broken(error: json.JSONDecodeError, name: str, line: int) -> UserError:
    return UserError(
        f"{name}, line {line + error.lineno - 1}: broken JSON ({error.msg}). Fix: correct or delete the row"
    )


def _deepest(text: str, index: int) -> int:
    """Return the start index of the most deeply nested object or list in the value at an index."""
    depth = max_depth = 0
    deepest = index
    for match in NESTING.finditer(text, index):
        if match[0] in "[{":
            depth += 1
            if depth > max_depth:
                max_depth, deepest = depth, match.start()
        elif match[0] in "]}":
            depth -= 1
            if depth <= 0:
                break
    return deepest


def _skip_space(text: str, index: int) -> int:
    """Return the index of the next character that is not white space."""
    match = SPACE.match(text, index)
    return match.end() if match else index


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a parsed object, marked if a name occurs twice."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    duplicate = _DuplicateName(record)
    names = [name for name, _ in pairs]
    duplicate.name = next(name for index, name in enumerate(names) if name in names[:index])
    return duplicate


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)
