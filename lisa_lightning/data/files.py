"""Read rows of local files of all supported kinds, with errors that name file and line: `read_records`."""

import gzip
import lzma
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from lisa_lightning.data.json_rows import json_rows
from lisa_lightning.data.normal_form import is_blank
from lisa_lightning.data.reading import Reading, Record
from lisa_lightning.data.tables import refuse_duplicate_columns, table_rows
from lisa_lightning.runtime.errors import UserError, first_line, printable

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_PATH = re.compile(r"embedded:(?P<name>[^\[]*)(\[:(?P<first>\d+)\])?")
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".ndjson")
COMPRESSED = (".gz", ".xz", ".zst")
MAX_NAME_CHARS: Final = 300
IRREGULAR: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
T = TypeVar("T")

__all__ = ["EMBEDDED", "Reading", "content_hash", "convert_rows", "read_records"]


def read_records(
    path: str, reading: Reading, make: Callable[[Record], T], header: Sequence[str] | None = None
) -> list[T]:
    """Return the results of `make` for the records of a file.

    Formats: JSON, JSON Lines, csv, tsv and parquet, optionally compressed as .gz, .xz or .zst.

    - Suffixes are case-insensitive.
    - A .json file may hold JSON Lines, and a .jsonl file one JSON list.
    - Lines that begin with "# " before the header of a csv or tsv are comments.
    - `tables.is_quoted` decides whether a tsv is quoted.

    Args:
        path: path of the file. `embedded:NAME` is a file of the package, `embedded:NAME[:N]` its first N rows.
        reading: the columns, labels and rows to read.
        make: converts a record to a result.
        header: the columns of a csv or tsv without a header line; None if it has one.

    Returns:
        One result per record in the file's order; at least one.

    Raises:
        UserError: if the file is missing, empty, broken, of an unknown kind, not a regular file or not UTF-8. Also if a
            row is broken, if a column is missing, null or empty, or if `make` rejects a value.
    """
    file, max_rows = _resolve(path)
    name = _display_name(str(file))
    kind = _kind(file, name)
    data = _read_bytes(file, name)
    rows = _parquet(data, name) if kind == ".parquet" else _text_rows(data, name, kind, header)
    del data
    return convert_rows(islice(rows, max_rows), name, reading, make)


def content_hash(path: str) -> str:
    """Return a hash of the file that `read_records` reads; "" if the file cannot be read."""
    try:
        file = _resolve(path)[0]
        if not stat.S_ISREG(file.stat().st_mode):
            return ""
        return sha256(file.read_bytes()).hexdigest()[:16]
    except (OSError, ValueError, UserError):
        return ""


def convert_rows(
    rows: Iterable[tuple[str, Record]], name: str, reading: Reading, make: Callable[[Record], T]
) -> list[T]:
    """Return the results of `make` for all rows that `reading` includes.

    Args:
        rows: position and cells of each row.
        name: the file or set, for errors.
        reading: the columns, labels and rows to read.
        make: converts a record to a result.

    Raises:
        UserError: if no row is included, if a cell is invalid, or if `make` rejects a value.
    """
    results = []
    for position, raw in rows:
        try:
            record = reading.record(raw)
            if record is not None:
                results.append(make(record))
        except UserError as error:
            raise UserError(f"{name}, {position}: {error}") from error
    if not results and reading.where:
        raise UserError(f"{name}: no rows with {dict(reading.where)} in it. Fix: change `where`")
    if not results:
        raise UserError(f"{name}: no rows in it. Fix: add rows")
    return results


def _resolve(path: str) -> tuple[Path, int | None]:
    """Return the file, and the number of its rows to read; None for all."""
    embedded = EMBEDDED_PATH.fullmatch(path)
    if embedded is not None:
        return EMBEDDED / embedded["name"], int(embedded["first"]) if embedded["first"] else None
    try:
        return Path(path).expanduser(), None
    except RuntimeError as error:
        name = _display_name(path)
        raise UserError(
            f"{name}: can't be read (no home directory for its first part). Fix: write the path in full"
        ) from error


def _display_name(path: str) -> str:
    """Return a path for error messages, on one line and with a long middle omitted."""
    name = printable(path)
    half = MAX_NAME_CHARS // 2
    return name if len(name) <= MAX_NAME_CHARS else f"{name[:half]}...{name[-half:]}"


def _kind(file: Path, name: str) -> str:
    """Return the suffix in `KINDS` of a file."""
    suffix = file.suffix.lower()
    kind = file.with_suffix("").suffix.lower() if suffix in COMPRESSED else suffix
    if kind not in KINDS:
        _refuse_irregular(file, name)
        allowed = f"{', '.join(KINDS)}, and these with {', '.join(COMPRESSED)}"
        raise UserError(
            f"{name}: files of kind '{printable(kind or suffix)[:40]}' can't be read; allowed: {allowed}. "
            "Fix: convert it, or rename it with the suffix of its kind"
        )
    return kind


def _refuse_irregular(file: Path, name: str) -> None:
    """Raise UserError if a path is not that of a regular file. A pipe, for example, may have no end."""
    try:
        mode = file.stat().st_mode
    except ValueError as error:
        raise UserError(f"{name}: can't be read ({error} in the path). Fix: correct the path") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError) and file.is_symlink():
            target = _display_name(str(file.readlink()))
            raise UserError(
                f"{name}: can't be read (it is a link to {target}, which is missing). Fix: renew the link"
            ) from error
        raise UserError(f"{name}: can't be read ({error.strerror or error}). Fix: correct the path") from error
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{name}: can't be read ({IRREGULAR.get(stat.S_IFMT(mode), 'a special file')}, not a regular file). "
            "Fix: write the rows into a regular file"
        )


def _read_bytes(file: Path, name: str) -> bytes:
    """Return the contents of a file, decompressed."""
    _refuse_irregular(file, name)
    try:
        data = file.read_bytes()
        if data:
            data = _decompress(data, file.suffix.lower())
    except OSError as error:
        raise UserError(
            f"{name}: can't be read ({printable(error.strerror or first_line(error))}). Fix: replace it"
        ) from error
    except (EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{name}: can't be read ({printable(first_line(error))}). Fix: replace it") from error
    if not data:
        raise UserError(f"{name}: the file is empty. Fix: add rows")
    return data


def _decompress(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.decompress(data)
    if suffix == ".xz":
        return lzma.decompress(data)
    if suffix == ".zst":
        import pyarrow

        with pyarrow.input_stream(pyarrow.py_buffer(data), compression="zstd") as stream:
            return stream.read()
    return data


def _text_rows(data: bytes, name: str, kind: str, header: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: not UTF-8. Fix: save the file as UTF-8") from error
    del data
    if is_blank(text):
        raise UserError(f"{name}: the file is empty. Fix: add rows")
    if kind in (".csv", ".tsv"):
        yield from table_rows(text, name, kind, header)
    else:
        yield from json_rows(text, name, kind)


def _parquet(data: bytes, name: str) -> Iterator[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(BytesIO(data))
        refuse_duplicate_columns(table.schema_arrow.names, name)
        for batch in table.iter_batches():
            for raw in _batch_rows(batch):
                number += 1
                yield f"row {number}", raw
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError) as error:
        position = f"{name}, after row {number}" if number else name
        raise UserError(f"{position}: can't be read ({printable(first_line(error))}). Fix: write it again") from error


def _batch_rows(batch: Any) -> list[Record]:
    """Return the rows of a record batch. Its texts are bytes if one of them is not UTF-8."""
    import pyarrow

    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
        texts = [pyarrow.types.is_string(c.type) or pyarrow.types.is_large_string(c.type) for c in columns]
        columns = [c.cast(pyarrow.large_binary()) if is_text else c for c, is_text in zip(columns, texts, strict=True)]
        return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()
