"""Read rows of comma- and tab-separated tables: `table_rows`, and `is_quoted` for tab-separated ones."""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Final

from lisa_lightning.data.reading import Record
from lisa_lightning.runtime.errors import UserError, printable

QUOTED_CELL: Final = re.compile(r'"(?:[^"]++|"")*+"(?=[\t\r\n]|\Z)')
"""Quoted cell up to the next tab or line end. Quotes inside are doubled."""
SEPARATOR: Final = re.compile(r"[\t\r\n]")
NEVER_QUOTED: Final = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|nan|na|null|none|true|false|", re.IGNORECASE
)
"""Cells that remain unquoted if a writer quotes every text: numbers, booleans and missing values."""
MAX_CELL_CHARS: Final = 2**31 - 1


def table_rows(text: str, name: str, kind: str, header: Sequence[str] | None) -> Iterator[tuple[str, Record]]:
    """Yield every row of a table with its position, "line N".

    Lines that begin with "# " before the header are comments. The position of a row with multi-line cells is its first
    line.

    Args:
        text: the file's text.
        name: the file, for errors.
        kind: ".csv" or ".tsv".
        header: the columns of a table without a header line; None if it has one.

    Raises:
        UserError: if two columns have the same name, a row has too many or too few cells, or a quote is not closed.
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
    refuse_duplicate_columns(names, f"{name}, header")
    line = comments + 1
    try:
        for cells in reader:
            if cells and not names:
                refuse_duplicate_columns(cells, f"{name}, line {line}")
                names = cells
            elif cells:
                if len(cells) != len(names):
                    raise UserError(
                        f"{name}, line {line}: {len(cells)} cells where the header has {len(names)}. "
                        f"Fix: write {len(names)} cells in the row"
                    )
                yield f"line {line}", dict(zip(names, cells, strict=True))
            line = comments + reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}, line {line}: {error}. Fix: quote the cells of this row with their inner quotes doubled"
        ) from error


def refuse_duplicate_columns(names: Sequence[str], position: str) -> None:
    """Raise UserError if two columns have the same name.

    Args:
        names: all columns.
        position: the file and line, for the error.
    """
    if len(set(names)) < len(names):
        repeated = next(name for index, name in enumerate(names) if name in names[:index])
        raise UserError(f"{position}: two columns are called '{printable(repeated)[:40]}'. Fix: rename one of them")


def is_quoted(text: str) -> bool:
    """Return whether a tab-separated table is quoted in the style of pandas, Excel or csv writers.

    GLUE's tables are unquoted: a quote at the start of a cell is part of the text. A table is quoted if every cell that
    begins with a quote is a well-formed quoted cell and one of these conditions holds:

    - a quoted cell has a doubled quote;
    - a quoted cell has a tab or line end, and the lines form no table without quoting (pandas, QUOTE_MINIMAL);
    - quoted cells have commas, and no other cell has one (Excel);
    - all cells except numbers, booleans and missing values are quoted (QUOTE_ALL, QUOTE_NONNUMERIC).
    """
    if not (text.startswith('"') or '\t"' in text or '\n"' in text or '\r"' in text):
        return False
    cells = _quoted_cells(text)
    if cells is None:
        return False
    return (
        cells.doubled
        or (cells.separators and not _is_rectangular(text))
        or (cells.commas and not cells.unquoted_commas)
        or cells.all_texts
    )


@dataclass
class _QuotedCells:
    """Features of the quoted and the unquoted cells of a table."""

    doubled: bool = False
    separators: bool = False
    commas: bool = False
    unquoted_commas: bool = False
    all_texts: bool = True


def _quoted_cells(text: str) -> _QuotedCells | None:
    """Return the features of a table's cells; None if a quoted cell is malformed."""
    cells = _QuotedCells()
    end = 0
    start = _next_quote(text, 0)
    while start >= 0:
        _update_unquoted(cells, text[end:start])
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
    _update_unquoted(cells, text[end:])
    return cells


def _update_unquoted(cells: _QuotedCells, text: str) -> None:
    """Update the features with the unquoted cells between two quoted ones."""
    cells.unquoted_commas = cells.unquoted_commas or "," in text
    cells.all_texts = cells.all_texts and all(NEVER_QUOTED.fullmatch(cell.strip()) for cell in SEPARATOR.split(text))


def _next_quote(text: str, start: int) -> int:
    """Return the index of the next quote at the start of a cell, -1 if no cell begins with one."""
    index = text.find('"', start)
    while index > 0 and text[index - 1] not in "\t\r\n":
        index = text.find('"', index + 1)
    return index


def _is_rectangular(text: str) -> bool:
    """Return whether all lines have the same number of cells, above 1, without quoting."""
    counts = {line.count("\t") for line in StringIO(text, newline="") if line.strip("\r\n")}
    return len(counts) == 1 and counts != {0}


def _after_comments(text: str) -> tuple[int, int]:
    """Return the index of the first character after the comment lines, and their number."""
    start = comments = 0
    while text.startswith("# ", start):
        end = text.find("\n", start)
        start = len(text) if end < 0 else end + 1
        comments += 1
    return start, comments
