"""Reading rows out of local files of all kinds, with errors that name file and line."""

import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO, StringIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from lisa_lightning.errors import UserError, first_line

EMBEDDED = Path(__file__).parent / "embedded"
SHIPPED = re.compile(r"embedded:(?P<name>[^\[]*)(\[:(?P<first>\d+)\])?")
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".xz", ".zst")

Record = dict[str, Any]


T = TypeVar("T")


@dataclass(frozen=True)
class Reading:
    """How the columns of a set become the fields of a record."""

    columns: Mapping[str, str | Sequence[str]]
    """Field -> its column, or several that are joined by a blank (AG News: title and description)."""
    optional: frozenset[str] = frozenset()
    """Fields that may be missing or null; "" then (Alpaca's input)."""
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field -> {its raw value: what to make of it}; compared as text, case ignored."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Column -> the value, or list of values, of the rows to keep; compared as text, case ignored."""

    def record(self, raw: Mapping[str, Any]) -> Record | None:
        """The record of a row, None where `where` leaves it out.

        Raises:
            UserError: a column is missing, null or no text, or a value has no label.
        """
        for column, wanted in self.where.items():
            values = [wanted] if isinstance(wanted, str) or not isinstance(wanted, Sequence) else wanted
            if _plain(_cell(raw, column)) not in map(_plain, values):
                return None
        return {name: self._value(raw, name, column) for name, column in self.columns.items()}

    def _value(self, raw: Mapping[str, Any], name: str, column: str | Sequence[str]) -> Any:
        columns = [column] if isinstance(column, str) else list(column)
        if name in self.optional and any(raw.get(c) is None for c in columns):
            return ""
        cells = [_cell(raw, c) for c in columns]
        for there, cell in zip(columns, cells, strict=True):
            _refuse_no_text(there, cell)
        value = cells[0] if len(cells) == 1 else " ".join(map(str, cells))
        if name not in self.labels:
            return value
        labels = {_plain(known): label for known, label in self.labels[name].items()}
        if _plain(value) not in labels:
            raise UserError(f"{name} {value!r} is not among its labels: {', '.join(self.labels[name])}")
        return labels[_plain(value)]


def read_records(
    path: str, reading: Reading, make: Callable[[Record], T], header: Sequence[str] | None = None
) -> list[T]:
    """What `make` makes of the records of a json, jsonl, csv, tsv or parquet file, also as .gz, .xz or .zst.

    A json file holds a list of objects, or an object of columns. A tsv is not quoted (GLUE's aren't). Lines that begin
    with "# " before the header of a csv or tsv are comments.

    Args:
        path: a file; `embedded:NAME` is one that ships with the package, `embedded:NAME[:N]` its first N rows.
        header: the columns of a csv or tsv that has no line of names.

    Raises:
        UserError: the file is missing, empty, broken, of an unknown kind or not UTF-8, a line is broken, a column is
            missing or null, `make` refuses a value.
    """
    file, first = _place(path)
    kind = file.with_suffix("").suffix if file.suffix in PACKED else file.suffix
    if kind not in KINDS:
        allowed = f"{', '.join(KINDS)}, and these with {', '.join(PACKED)}"
        raise UserError(f"{path}: files of kind '{kind or file.suffix}' can't be read; allowed: {allowed}")
    return read(islice(_rows(file, kind, header), first), str(file), reading, make)


def content(path: str) -> str:
    """A hash of the file that `read_records` reads; empty where it can't be read."""
    try:
        return sha256(_place(path)[0].read_bytes()).hexdigest()[:16]
    except OSError:
        return ""


def _place(path: str) -> tuple[Path, int | None]:
    """The file, and how many of its rows are meant, None for all."""
    shipped = SHIPPED.fullmatch(path)
    if shipped is None:
        return Path(path).expanduser(), None
    return EMBEDDED / shipped["name"], int(shipped["first"]) if shipped["first"] else None


def read(rows: Iterable[tuple[str, Record]], name: str, reading: Reading, make: Callable[[Record], T]) -> list[T]:
    """What `make` makes of the rows, each with its place, that `reading` keeps.

    Raises:
        UserError: it keeps none; a column is missing or null, or `make` refuses a value, with name and place.
    """
    records = []
    for place, raw in rows:
        try:
            record = reading.record(raw)
            if record is not None:
                records.append(make(record))
        except UserError as error:
            raise UserError(f"{name}, {place}: {error}") from error
    if not records:
        raise UserError(f"{name}: no rows" + (f" with {dict(reading.where)}" if reading.where else "") + " in it")
    return records


def _rows(file: Path, kind: str, header: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    """Every row and its place."""
    data = _content(file)
    if kind == ".parquet":
        yield from _parquet(data, file)
        return
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8") from error
    del data
    if not text.strip():
        raise UserError(f"{file}: the file is empty")
    if kind == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                place = f"line {number}"
                yield place, _object(_json(line, file, number), file, place)
    elif kind == ".json":
        for number, item in enumerate(_items(_json(text, file, 1), file), 1):
            yield f"row {number}", _object(item, file, f"row {number}")
    else:
        yield from _table(text, file, kind, header)


def _content(file: Path) -> bytes:
    try:
        if file.suffix == ".gz":
            return gzip.decompress(file.read_bytes())
        if file.suffix == ".xz":
            return lzma.decompress(file.read_bytes())
        if file.suffix == ".zst":
            import pyarrow

            file.open("rb").close()  # for the system's own words where that fails
            with pyarrow.input_stream(str(file), compression="zstd") as stream:
                return stream.read()
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error})") from error
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{file}: can't be read ({error})") from error


def _parquet(data: bytes, file: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(BytesIO(data))
        number = 0
        for batch in table.iter_batches():
            for raw in batch.to_pylist():
                number += 1
                yield f"row {number}", raw
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: can't be read ({first_line(error)})") from error


def _table(text: str, file: Path, kind: str, header: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    lines = StringIO(text, newline="")
    comments = 0
    while header is None and text.startswith("# "):
        lines.readline()
        text = text.partition("\n")[2]
        comments += 1
    # Tab-separated sets (GLUE) are not quoted, and a lone quotation mark in them must not swallow lines.
    tabs = kind == ".tsv"
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the library's 131,072 characters
    reader = csv.reader(
        lines,
        delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        strict=not tabs,
    )
    try:
        names = list(header) if header else next(reader, [])
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{file}, line {comments + 1}: two columns are called '{twice[0]}'")
        for cells in reader:
            place = f"line {comments + reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(f"{file}, {place}: {len(cells)} cells where the header has {len(names)}")
            yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, line {comments + reader.line_num}: {error}") from error


def _items(value: Any, file: Path) -> list[Any]:
    """The rows of a JSON file: its list, or its columns turned; an empty column is one that isn't there."""
    if isinstance(value, list):
        return value
    columns = {k: v for k, v in value.items() if v != []} if isinstance(value, dict) else {}
    lengths = {len(v) if isinstance(v, list) else -1 for v in columns.values()}
    if len(lengths) != 1 or -1 in lengths:
        raise UserError(
            f"{file}, line 1: a JSON file must hold a list of objects, or an object of columns of one length"
        )
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def _json(text: str, file: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {line + error.lineno - 1}: broken JSON ({error.msg})") from error


def _object(value: Any, file: Path, place: str) -> Record:
    if not isinstance(value, dict):
        raise UserError(f"{file}, {place}: not a JSON object")
    return value


def _refuse_no_text(column: str, cell: Any) -> None:
    """Raises UserError for what text can't be made of, or only such as nobody means."""
    if cell is None:
        raise UserError(f"column '{column}' is null")
    if isinstance(cell, list | dict | tuple) or cell != cell:
        raise UserError(f"column '{column}' is no text: {type(cell).__name__} {str(cell)[:20]}")
    try:
        str(cell).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"column '{column}' holds half of a character: {error.object[error.start]!r}") from None


def _cell(raw: Mapping[str, Any], column: str) -> Any:
    if column not in raw:
        raise UserError(f"column '{column}' is missing; there are: {', '.join(map(str, raw))}")
    return raw[column]


def _plain(value: Any) -> str:
    return str(value).strip().lower()
