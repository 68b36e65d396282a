"""Read rows of JSON and JSON Lines files, whichever their suffix is."""

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
"""More digits than Python converts."""
ONE_OBJECT_A_LINE: Final = "Fix: write one object a line, or one list of objects"


class _Repeated(dict[str, Any]):
    """An object in which a name occurs twice, so that a value is lost."""

    name: str


def json_rows(text: str, name: str, kind: str) -> Iterator[tuple[str, Record]]:
    """Yield every row of a JSON or JSON Lines file with its position.

    A file holds an object a line, a list of objects, or an object of columns. An object of which a value is no list
    is one row.

    Args:
        text: the file's text, which is not blank.
        name: the file, for errors.
        kind: ".json", or the suffix of a JSON Lines file.

    Raises:
        UserError: A value is broken, nested too deeply or no object, an integer is too long, or an object has two
            values of one name.
    """
    if _has_value_a_line(text, kind):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                position = f"line {number}"
                yield position, _record(_only_value(line, name, number), name, position)
    elif text.lstrip().startswith("["):
        yield from _elements(text, name)
    else:
        yield from _columns(_only_value(text, name, 1), name)


def _has_value_a_line(text: str, kind: str) -> bool:
    """Return whether the lines are values of their own, not parts of one value."""
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
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    except (RecursionError, ValueError):
        return True
    return True


def _elements(text: str, name: str) -> Iterator[tuple[str, Record]]:
    """Yield the objects of a list, parsed one by one so that each has its line."""
    index = _skip(text, text.index("[") + 1)
    number, line, counted = 0, 1, 0
    is_last = text[index : index + 1] == "]"
    while not is_last:
        number, line, counted = number + 1, line + text.count("\n", counted, index), index
        value, index = _value(text, index, name, 1)
        position = f"line {line}, row {number}"
        yield position, _record(value, name, position)
        index = _skip(text, index)
        is_last = text[index : index + 1] == "]"
        if not is_last and text[index : index + 1] != ",":
            raise _broken(json.JSONDecodeError("Expecting ',' delimiter", text, index), name, 1)
        index = index if is_last else _skip(text, index + 1)
    index = _skip(text, index + 1)
    if index < len(text):
        raise _broken(json.JSONDecodeError("Extra data", text, index), name, 1)


def _columns(value: Any, name: str) -> Iterator[tuple[str, Record]]:
    """Yield the rows of an object of columns; an empty column counts as missing."""
    record = _record(value, name, "line 1") if isinstance(value, dict) else {}
    if not all(isinstance(cells, list) for cells in record.values()):
        yield "line 1", record
        return
    columns = {column: cells for column, cells in record.items() if cells}
    if len({len(cells) for cells in columns.values()}) != 1:
        raise UserError(
            f"{name}, line 1: a JSON file must hold a list of objects, an object a line, or an object of columns "
            f"of one length. {ONE_OBJECT_A_LINE}"
        )
    for number, cells in enumerate(zip(*columns.values(), strict=True), 1):
        yield f"row {number}", dict(zip(columns, cells, strict=True))


def _record(value: Any, name: str, position: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{name}, {position}: not a JSON object but {_kind(value)}. {ONE_OBJECT_A_LINE}")
    if isinstance(value, _Repeated):
        raise UserError(f"{name}, {position}: two columns are called '{printable(value.name)[:40]}'. Fix: delete one")
    return value


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _only_value(text: str, name: str, line: int) -> Any:
    value, index = _value(text, _skip(text, 0), name, line)
    index = _skip(text, index)
    if index < len(text):
        raise _broken(json.JSONDecodeError("Extra data", text, index), name, line)
    return value


def _value(text: str, index: int, name: str, line: int) -> tuple[Any, int]:
    """Return the value that begins at an index, and the index after it.

    Args:
        line: the number of the text's first line.
    """
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
    """Return where the deepest object or list of the value at an index begins."""
    depth = greatest = 0
    deepest = index
    for match in NESTING.finditer(text, index):
        if match[0] in "[{":
            depth += 1
            if depth > greatest:
                greatest, deepest = depth, match.start()
        elif match[0] in "]}":
            depth -= 1
            if depth <= 0:
                break
    return deepest


def _skip(text: str, index: int) -> int:
    match = SPACE.match(text, index)
    return match.end() if match else index


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    repeated = _Repeated(record)
    names = [name for name, _ in pairs]
    repeated.name = next(name for index, name in enumerate(names) if name in names[:index])
    return repeated


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object)
