"""Reading rows out of local files, with errors that name file and line."""

import csv
import json
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from lisa_lightning.errors import UserError

EMBEDDED = Path(__file__).parent / "embedded"
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")

Record = dict[str, Any]


T = TypeVar("T")


def read_records(path: str, columns: dict[str, str], where: dict[str, Any], make: Callable[[Record], T]) -> list[T]:
    """What `make` makes of the records of a json, jsonl, csv or tsv file.

    Args:
        path: a file; `embedded:NAME` is one that ships with the package.
        columns: field -> column to read it from. `make` gets a record with exactly these fields.
        where: column -> value; records with another value are left out (compared as text, case ignored).

    Raises:
        UserError: the file is missing, empty, of an unknown kind or not UTF-8, a line is broken, a column is missing
            or null, `make` refuses a value.
    """
    file = EMBEDDED / path.removeprefix("embedded:") if path.startswith("embedded:") else Path(path).expanduser()
    if file.suffix not in SUFFIXES:
        raise UserError(f"{path}: files of kind '{file.suffix}' can't be read; allowed: {', '.join(SUFFIXES)}")
    records = []
    for line, raw in _parse(file):
        missing = [c for c in (*columns.values(), *where) if c not in raw]
        if missing:
            has = ", ".join(map(str, raw))
            raise UserError(f"{file}, line {line}: column '{missing[0]}' is missing; there are: {has}")
        if all(str(raw[c]).strip().lower() == str(v).strip().lower() for c, v in where.items()):
            record = {field: raw[column] for field, column in columns.items()}
            empty = [columns[field] for field, value in record.items() if value is None]
            if empty:
                raise UserError(f"{file}, line {line}: column '{empty[0]}' is null")
            try:
                records.append(make(record))
            except UserError as error:
                raise UserError(f"{file}, line {line}: {error}") from error
    if not records:
        raise UserError(f"{file}: no rows" + (f" with {where}" if where else "") + " in it")
    return records


def _parse(file: Path) -> Iterator[tuple[int, Record]]:
    text = _text(file)
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield number, _object(_json(line, file, number), file, number)
    elif file.suffix == ".json":
        value = _json(text, file, 1)
        if not isinstance(value, list):
            raise UserError(f"{file}, line 1: a JSON file must hold a list of objects")
        for number, item in enumerate(value, 1):
            yield number, _object(item, file, number)
    else:
        yield from _table(text, file)


def _table(text: str, file: Path) -> Iterator[tuple[int, Record]]:
    # Tab-separated sets (GLUE) are not quoted, and a lone quotation mark in them must not swallow lines.
    tabs = file.suffix == ".tsv"
    reader = csv.reader(
        StringIO(text, newline=""),
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=not tabs,
    )
    try:
        header = next(reader)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{file}, line {reader.line_num}: {len(cells)} cells where the header has {len(header)}"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}") from error


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8") from error
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    return text


def _json(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {line + error.lineno - 1}: broken JSON ({error.msg})") from error


def _object(value: Any, file: Path, line: int) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{file}, line {line}: not a JSON object")
    return value
