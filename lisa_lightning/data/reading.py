"""Build records from the columns of a set, and check every cell that is read: `Reading.record`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from lisa_lightning.data.normal_form import is_blank, normal_value
from lisa_lightning.runtime.errors import UserError, printable

Record = dict[str, Any]
FIX_ROW = "Fix: delete the row or filter it by `where`"
_MAX_VALUE_CHARS = 40
_MAX_LISTED_NAMES = 30


@dataclass(frozen=True)
class Reading:
    """Fields of a record, their columns, and a filter of the rows to read."""

    columns: Mapping[str, str | Sequence[str]]
    """Field -> its column, or several columns that are joined by a blank (AG News: title and description)."""
    optional: frozenset[str] = frozenset()
    """Fields that may be missing or null. Their value is then "" (Alpaca's input)."""
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field -> {raw value: label}. Raw values are compared by `normal_value`."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Column -> value or list of values of the rows to read. They are compared by `normal_value`; None is null."""
    filled: frozenset[str] = frozenset()
    """Fields whose text must have a visible character."""

    def record(self, raw: Mapping[str, Any]) -> Record | None:
        """Return the record of a row; None if `where` excludes the row.

        Args:
            raw: column -> cell.

        Raises:
            UserError: if a column is missing, null, empty or not a text, or if a value has no label.
        """
        for column, values in self._where.items():
            cell = _cell(raw, column, "spell the name in `where` as the file does")
            _refuse_nested(column, cell)
            if normal_value(cell) not in values:
                return None
        return {name: self._value(raw, name, columns) for name, columns in self._columns.items()}

    def _value(self, raw: Mapping[str, Any], name: str, columns: Sequence[str]) -> Any:
        if name in self.optional and any(_lookup(raw, column) is None for column in columns):
            return ""
        cells = [_text_cell(raw, column, name) for column in columns]
        value = cells[0] if len(cells) == 1 else " ".join(map(str, cells))
        if name in self.labels:
            value = self._label(name, value)
        if name in self.filled and is_blank(str(value)):
            raise UserError(f"column '{', '.join(columns)}' is empty. {FIX_ROW}")
        return value

    def _label(self, name: str, value: Any) -> str:
        labels = self._labels[name]
        key = normal_value(value)
        if key not in labels:
            raise UserError(
                f"{name} {format_value(value)} is not among its labels: {', '.join(map(str, self.labels[name]))}. "
                "Fix: add it to `labels`, or filter the row by `where`"
            )
        return labels[key]

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        return {name: [column] if isinstance(column, str) else list(column) for name, column in self.columns.items()}

    @cached_property
    def _labels(self) -> dict[str, dict[str | None, str]]:
        return {name: normal_labels(f"labels.{name}", labels) for name, labels in self.labels.items()}

    @cached_property
    def _where(self) -> dict[str, frozenset[str | None]]:
        return {column: frozenset(map(normal_value, _as_list(values))) for column, values in self.where.items()}


def normal_labels(key: str, labels: Mapping[Any, str]) -> dict[str | None, str]:
    """Return the labels by the normal form of their raw values.

    Args:
        key: the config key of the labels, for the error.
        labels: raw value -> label.

    Raises:
        UserError: if two raw values are equal and have different labels.
    """
    normal: dict[str | None, str] = {}
    for raw, label in labels.items():
        if normal.setdefault(normal_value(raw), label) != label:
            first = next(other for other in labels if normal_value(other) == normal_value(raw))
            raise UserError(
                f"{key}={{{first}: {labels[first]}, {raw}: {label}}}: {first} and {raw} are the same value with "
                "different labels. Fix: keep one label for the value"
            )
    return normal


def format_value(value: Any) -> str:
    """Return a value for an error message: on one line, shortened, and quoted if it is text."""
    text = printable(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}..."


def _as_list(values: Any) -> Sequence[Any]:
    return values if isinstance(values, Sequence) and not isinstance(values, str) else [values]


@lru_cache(maxsize=4096)
def _normal_name(name: str) -> str | None:
    return normal_value(name)


def _matching(raw: Mapping[str, Any], column: str) -> str | None:
    """Return the spelling of a column name in a row; None if the row has no such column."""
    if column in raw:
        return column
    return _spelling(tuple(raw), column)


# The rows of a file have few headers, and the search takes as long as reading a row.
@lru_cache(maxsize=256)
def _spelling(header: tuple[str, ...], column: str) -> str | None:
    """Return the spelling of a column name in a header; None if the header lacks it.

    Raises:
        UserError: if several names of the header have the normal form of the column's name.
    """
    normal = normal_value(column)
    names = [name for name in header if _normal_name(str(name)) == normal]
    if len(names) > 1:
        raise UserError(f"column '{column}' can be {_format_names(names)}. Fix: spell the name as the file does")
    return names[0] if names else None


def _lookup(raw: Mapping[str, Any], column: str) -> Any:
    """Return a cell, with bytes decoded as UTF-8; None if it is null or missing."""
    name = _matching(raw, column)
    cell = None if name is None else raw[name]
    if not isinstance(cell, bytes | bytearray | memoryview):
        return cell
    try:
        return bytes(cell).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"column '{column}' has bytes that are not UTF-8. Fix: write it as text, or filter the row by `where`"
        ) from None


def _cell(raw: Mapping[str, Any], column: str, fix: str) -> Any:
    """Return a cell; None if it is null. Raise UserError with `fix` if it is missing."""
    if _matching(raw, column) is None:
        raise UserError(f"column '{column}' is missing; there are: {_format_names(raw)}. Fix: {fix}")
    return _lookup(raw, column)


def _text_cell(raw: Mapping[str, Any], column: str, name: str) -> Any:
    """Return the cell of a field. Raise UserError if it has no text form."""
    cell = raw.get(column)
    # This is the fast path of nearly every cell. A set may have millions.
    if type(cell) is str and cell.isascii():
        return cell
    cell = _cell(raw, column, f"name the column of '{name}' by `columns`")
    _refuse_no_text(column, cell)
    return cell


def _format_names(names: Iterable[Any]) -> str:
    """Return names for an error message, shortened."""
    listed = [printable(str(name))[:_MAX_VALUE_CHARS] for name in names]
    return ", ".join(listed[:_MAX_LISTED_NAMES]) + (", ..." if len(listed) > _MAX_LISTED_NAMES else "")


def _refuse_no_text(column: str, cell: Any) -> None:
    """Raise UserError if a cell is null, nested, not finite or no valid Unicode."""
    if cell is None:
        raise UserError(f"column '{column}' is null. {FIX_ROW}")
    _refuse_nested(column, cell)
    if cell != cell or (isinstance(cell, float) and not math.isfinite(cell)):
        raise UserError(f"column '{column}' is no text: {type(cell).__name__} {cell}. {FIX_ROW}")
    try:
        str(cell).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"column '{column}' holds half of a character: {error.object[error.start]!r}. {FIX_ROW}"
        ) from None


def _refuse_nested(column: str, cell: Any) -> None:
    if isinstance(cell, list | dict | tuple | set):
        kind = type(cell).__name__
        raise UserError(f"column '{column}' is no text: {kind} of {len(cell)} values. Fix: write it as one text")
