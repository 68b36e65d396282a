"""Rows of comma- and tab-separated tables, and the decision whether a tab-separated one is quoted."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Final

from lisa_lightning.data.reading import Record
from lisa_lightning.runtime.errors import UserError, printable

QUOTED_CELL: Final = re.compile(r'"(?:[^"]++|"")*+"(?=[\t\r\n]|\Z)')
"""A quoted cell up to the tab or line end after it. Quotes inside are doubled."""
SEPARATOR: Final = re.compile(r"[\t\r\n]")
NEVER_QUOTED: Final = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|nan|na|null|none|true|false|", re.IGNORECASE
)
"""Cells that writers leave unquoted when they quote every text: numbers, booleans and missing values."""
MAX_CELL_CHARS: Final = 2**31 - 1


def table_rows(text: str, name: str, kind: str, header: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    """Yield every row of a table with its position, "line N".

    Lines before the line of names that begin with "# " are comments. A row with a cell of several lines has the number
    of its first line.

    Args:
        text: the file's text.
        name: the file, for errors.
        kind: ".csv" or ".tsv".
        header: the columns of a table without a line of names.

    Raises:
        UserError: Two columns have one name, a row has too many or too few cells, or a quote is not closed.
    """
    start, comments = (0, 0) if header else _after_comments(text)
    csv.field_size_limit(MAX_CELL_CHARS)  # The library's default, 131,072 characters, is shorter than some answers.
    quoted = kind == ".csv" or is_quoted(text[start:])
    lines = StringIO(text, newline="")
    lines.seek(start)
    reader = csv.reader(
        lines,
        delimiter="\t" if kind == ".tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=quoted,
    )
    names: list[str] = list(header or ())
    refuse_repeated(names, f"{name}, header")
    line = comments + 1
    try:
        for cells in reader:
            if cells and not names:
                refuse_repeated(cells, f"{name}, line {line}")
                names = cells
            elif cells:
                if len(cells) != len(names):
                    raise UserError(
                        f"{name}, line {line}: {len(cells)} cells where the header has {len(names)}. "
                        f"Fix: give the row {len(names)} cells"
                    )
                yield f"line {line}", dict(zip(names, cells, strict=True))
            line = comments + reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}, line {line}: {error}. Fix: quote the cells of this row with their inner quotes doubled"
        ) from error


def refuse_repeated(names: Sequence[str], position: str) -> None:
    """Raise UserError if two columns have one name.

    Args:
        names: all columns.
        position: the file and line, for the error.
    """
    if len(set(names)) < len(names):
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"{position}: two columns are called '{printable(repeated)[:40]}'. Fix: rename one of them")


def is_quoted(text: str) -> bool:
    """Return whether a tab-separated table is quoted, as pandas, Excel and csv writers do it.

    GLUE's tables are not: a quote at a cell's start is part of the text. A table is quoted if every cell that begins
    with a quote is a well-formed quoted cell, and one of these holds:

    - a quoted cell has a doubled quote;
    - a quoted cell has a tab or line end, and the lines do not form a table without it (pandas, QUOTE_MINIMAL);
    - quoted cells have commas, and no other cell has one (Excel);
    - all cells are quoted, but for numbers, booleans and missing values (QUOTE_ALL, QUOTE_NONNUMERIC).
    """
    if not (text.startswith('"') or '\t"' in text or '\n"' in text or '\r"' in text):
        return False
    cells = _quoted_cells(text)
    if cells is None:
        return False
    return (
        cells.doubled
        or (cells.separators and not _is_rectangular(text))
        or (cells.commas and not cells.bare_commas)
        or cells.all_texts
    )


@dataclass
class _QuotedCells:
    """Features of the quoted and the unquoted cells of a table."""

    doubled: bool = False
    separators: bool = False
    commas: bool = False
    bare_commas: bool = False
    all_texts: bool = True


def _quoted_cells(text: str) -> _QuotedCells | None:
    """Return what the quoted cells of a table have; None if one of them is malformed."""
    cells = _QuotedCells()
    end = 0
    start = _next_quote(text, 0)
    while start >= 0:
        _note_bare(cells, text[end:start])
        match = QUOTED_CELL.match(text, start)
        if match is None:
            return None
        end = match.end()
        content = text[start + 1 : end - 1]
        separators = SEPARATOR.search(content) is not None
        cells.separators |= separators
        cells.doubled |= '"' in content
        cells.commas |= "," in content
        start = _next_quote(text, end)
    _note_bare(cells, text[end:])
    return cells


def _note_bare(cells: _QuotedCells, text: str) -> None:
    """Note what the unquoted cells between two quoted ones have."""
    cells.bare_commas = cells.bare_commas or "," in text
    cells.all_texts = cells.all_texts and all(NEVER_QUOTED.fullmatch(cell.strip()) for cell in SEPARATOR.split(text))


def _next_quote(text: str, start: int) -> int:
    """Return the index of the next quote at a cell's start, -1 if there is none."""
    index = text.find('"', start)
    while index > 0 and text[index - 1] not in "\t\r\n":
        index = text.find('"', index + 1)
    return index


def _is_rectangular(text: str) -> bool:
    """Return whether all lines have one number of cells, above 1, if quotes mean nothing."""
    counts = {line.count("\t") for line in StringIO(text, newline="") if line.strip("\r\n")}
    return len(counts) == 1 and counts != {0}


def _after_comments(text: str) -> tuple[int, int]:
    """Return the index of the first character after the comments, and the number of their lines."""
    start = comments = 0
    while text.startswith("# ", start):
        end = text.find("\n", start)
        start = len(text) if end < 0 else end + 1
        comments += 1
    return start, comments
