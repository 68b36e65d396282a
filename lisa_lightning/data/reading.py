"""Make the fields of a record from the columns of a set: `Reading`, and the checks of every cell that is used."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from lisa_lightning.data.normal_form import is_blank, normal_value
from lisa_lightning.runtime.errors import UserError, printable

Record = dict[str, Any]
WAY_OUT = "Fix: delete the row or filter it by `where`"
_MAX_VALUE_CHARS = 40
_MAX_SHOWN_NAMES = 30


@dataclass(frozen=True)
class Reading:
    """The fields of a record, the columns they are read from, and the rows that are read."""

    columns: Mapping[str, str | Sequence[str]]
    """Field -> its column, or several that are joined by a blank (AG News: title and description)."""
    optional: frozenset[str] = frozenset()
    """Fields that may be missing or null, which makes them "" (Alpaca's input)."""
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Field -> {raw value: the value it becomes}; raw values are compared by `normal_value`."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Column -> the value, or list of values, of the rows to read; compared by `normal_value`, None is null."""
    filled: frozenset[str] = frozenset()
    """Fields whose text must have a visible character."""

    def record(self, raw: Mapping[str, Any]) -> Record | None:
        """Return the record of a row, None if `where` excludes the row.

        Args:
            raw: column -> cell.

        Raises:
            UserError: A column is missing, null, empty or no text, or a value has no label.
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
            raise UserError(f"column '{', '.join(columns)}' is empty. {WAY_OUT}")
        return value

    def _label(self, name: str, value: Any) -> str:
        labels = self._labels[name]
        key = normal_value(value)
        if key not in labels:
            raise UserError(
                f"{name} {shown(value)} is not among its labels: {', '.join(map(str, self.labels[name]))}. "
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
        return {column: frozenset(map(normal_value, _listed(values))) for column, values in self.where.items()}


def normal_labels(key: str, labels: Mapping[Any, str]) -> dict[str | None, str]:
    """Return the labels by the normal form of their raw values.

    Args:
        key: the config key of the labels, for the error.
        labels: raw value -> label.

    Raises:
        UserError: Two raw values are equal and have different labels.
    """
    normal: dict[str | None, str] = {}
    for raw, label in labels.items():
        if normal.setdefault(normal_value(raw), label) != label:
            first = next(r for r in labels if normal_value(r) == normal_value(raw))
            raise UserError(
                f"{key}={{{first}: {labels[first]}, {raw}: {label}}}: {first} and {raw} are the same value with "
                "different labels. Fix: give the value one label"
            )
    return normal


def shown(value: Any) -> str:
    """Return a value for an error message: quoted if it is text, on one line, and shortened."""
    text = printable(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= _MAX_VALUE_CHARS else f"{text[:_MAX_VALUE_CHARS]}..."


def _listed(values: Any) -> Sequence[Any]:
    return values if isinstance(values, Sequence) and not isinstance(values, str) else [values]


@lru_cache(maxsize=4096)
def _normal_name(name: str) -> str | None:
    return normal_value(name)


def _matching(raw: Mapping[str, Any], column: str) -> str | None:
    """Return the row's own spelling of a column name; None if the row has no such column."""
    if column in raw:
        return column
    return _spelling(tuple(raw), column)


# The rows of a file have few headers, and the search takes as long as reading the whole row.
@lru_cache(maxsize=256)
def _spelling(header: tuple[str, ...], column: str) -> str | None:
    """Return the spelling of a column name in a header; None if there is no such column.

    Raises:
        UserError: Several names of the header are equal to the column's in their normal form.
    """
    normal = normal_value(column)
    names = [name for name in header if _normal_name(str(name)) == normal]
    if len(names) > 1:
        raise UserError(f"column '{column}' can be {_names(names)}. Fix: spell the name as the file does")
    return names[0] if names else None


def _lookup(raw: Mapping[str, Any], column: str) -> Any:
    """Return a cell, bytes decoded as UTF-8; None if it is null or missing."""
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
    if _matching(raw, column) is None:
        raise UserError(f"column '{column}' is missing; there are: {_names(raw)}. Fix: {fix}")
    return _lookup(raw, column)


def _text_cell(raw: Mapping[str, Any], column: str, name: str) -> Any:
    """Return the cell of a field, checked to have a text form."""
    cell = raw.get(column)
    # Nearly every cell is such a text, and there may be millions.
    if type(cell) is str and cell.isascii():
        return cell
    cell = _cell(raw, column, f"name the column of '{name}' by `columns`")
    _refuse_no_text(column, cell)
    return cell


def _names(names: Iterable[Any]) -> str:
    listed = [printable(str(name))[:_MAX_VALUE_CHARS] for name in names]
    return ", ".join(listed[:_MAX_SHOWN_NAMES]) + (", ..." if len(listed) > _MAX_SHOWN_NAMES else "")


def _refuse_no_text(column: str, cell: Any) -> None:
    """Raise UserError for a cell that has no text form, or only an unintended one."""
    if cell is None:
        raise UserError(f"column '{column}' is null. {WAY_OUT}")
    _refuse_nested(column, cell)
    if cell != cell or (isinstance(cell, float) and not math.isfinite(cell)):
        raise UserError(f"column '{column}' is no text: {type(cell).__name__} {cell}. {WAY_OUT}")
    try:
        str(cell).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"column '{column}' holds half of a character: {error.object[error.start]!r}. {WAY_OUT}"
        ) from None


def _refuse_nested(column: str, cell: Any) -> None:
    if isinstance(cell, list | dict | tuple | set):
        kind = type(cell).__name__
        raise UserError(f"column '{column}' is no text: {kind} of {len(cell)} values. Fix: write it as one text")
