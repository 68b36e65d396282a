"""The file curves.csv: `Curves` writes it, `read_rows` reads it."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import read_text, reraise_write_errors, write_text

CurveRow = dict[str, str]


class Curves:
    """`curves.csv`: one row per stage and optimizer step, a column per metric, empty where nothing was measured.

    The step of a row is the number of finished optimizer steps.

    Raises:
        UserError: if the file exists and is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["stage", "step"]
        self._hashes: dict[str, Any] = {}
        self._last: _LastRow | None = None
        rows = self.rows()
        if rows:
            self.columns = list(rows[0])
            self._rewrite(rows)

    def rows(self, stage: str | None = None) -> list[CurveRow]:
        """Return all complete rows, or those of one stage, as text."""
        return [r for r in read_rows(self.path) if stage is None or r["stage"] == stage]

    def log(self, stage: str, step: int, metrics: Mapping[str, float | str]) -> None:
        """Add metrics to the row of a step; the row is in the file when this returns.

        Args:
            stage: finetune or align.
            step: number of finished steps. Lightning's own callbacks count late, so an earlier step than the last
                row's means the last row's.
            metrics: of one step; several calls for the same step fill one row.
        """
        if self._last is not None and self._last.stage == stage and step <= self._last.step:
            step, metrics = self._last.step, {**self._last.metrics, **metrics}
            self._drop_last_row()
        self._extend_columns(metrics)
        start = self.path.stat().st_size
        with reraise_write_errors(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(
                {"stage": stage, "step": step} | dict(metrics)
            )
        self._close_last_row()
        self._last = _LastRow(stage, step, dict(metrics), start)

    def _extend_columns(self, metrics: Mapping[str, float | str]) -> None:
        new = [name for name in metrics if name not in self.columns]
        if new or not self.path.exists():
            rows = self.rows()
            self.columns += new
            self._rewrite(rows)

    def _drop_last_row(self) -> None:
        assert self._last is not None
        with reraise_write_errors(self.path), self.path.open("r+b") as file:
            file.truncate(self._last.start)
        self._last = None

    def _close_last_row(self) -> None:
        """Add the last row to the hash of its stage: no further metrics of its step will come."""
        if self._last is not None:
            self._hash(self._last.stage).update(self._last.canonical)
            self._last = None

    def flush(self) -> None:
        """Write all rows to the disk."""
        if self.path.exists():
            with reraise_write_errors(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def digest(self, stage: str) -> str:
        """Return a hash of all rows of a stage, which a checkpoint stores so that lost rows are noticed."""
        state = self._hash(stage).copy()
        if self._last is not None and self._last.stage == stage:
            state.update(self._last.canonical)
        return state.hexdigest()

    def _hash(self, stage: str) -> Any:
        if stage not in self._hashes:
            self._hashes[stage] = hashlib.sha256()
        return self._hashes[stage]

    def drop_after(self, stage: str, step: int) -> None:
        """Remove the rows of a stage after a step: they will be computed again."""
        self._close_last_row()
        rows = [r for r in self.rows() if r["stage"] != stage or int(r["step"]) <= step]
        last = rows[-1] if rows and rows[-1]["stage"] == stage else None
        self._hashes[stage] = hashlib.sha256()
        for row in rows:
            if row["stage"] == stage and row is not last:
                self._hashes[stage].update(_canonical(row))
        if last is None:
            self._rewrite(rows)
            return
        self._rewrite(rows[:-1])
        cells = {name: value for name, value in last.items() if name not in ("stage", "step") and value != ""}
        self.log(stage, int(last["step"]), cells)

    def insert(self, rows: Sequence[CurveRow]) -> None:
        """Replace the rows of a stage by those of a finished one."""
        self._close_last_row()
        self.columns += [name for name in rows[0] if name not in self.columns]
        self._rewrite([*(r for r in self.rows() if r["stage"] != rows[0]["stage"]), *rows])

    def export(self, stage: str, path: Path) -> None:
        """Write the rows of one stage to another file."""
        _write_rows(path, self.columns, self.rows(stage))

    def _rewrite(self, rows: Sequence[CurveRow]) -> None:
        _write_rows(self.path, self.columns, rows)


@dataclass(frozen=True)
class _LastRow:
    """The last row of the file, to which metrics of the same step may be added."""

    stage: str
    step: int
    metrics: dict[str, float | str]
    start: int
    """Size of the file before the row."""

    @property
    def canonical(self) -> bytes:
        """The row as it enters the hash of its stage."""
        return _canonical({"step": self.step} | self.metrics)


def _write_rows(path: Path, columns: Sequence[str], rows: Sequence[CurveRow]) -> None:
    out = StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, out.getvalue())


def _canonical(row: Mapping[str, Any]) -> bytes:
    """Return the measured cells of a row as bytes, without empty ones."""
    cells = sorted((name, str(value)) for name, value in row.items() if name != "stage" and value != "")
    return json.dumps(cells).encode() + b"\n"


def read_rows(path: Path) -> list[CurveRow]:
    """Return the rows of a curves file, [] where there is none.

    A last line without its end is left out: it is what a killed run leaves.

    Raises:
        UserError: if the file isn't UTF-8, or a line isn't what `Curves` writes; with the line.
    """
    if not path.exists():
        return []
    try:
        lines = [line for line in read_text(path).splitlines(keepends=True) if line.endswith("\n")]
        return [*_checked(csv.DictReader(lines, strict=True))]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is broken: {printable(str(error))[:200]}. Fix: delete it and {path.parent / 'checkpoints'}; with "
            "resume=true finished stages come from the cache, others start again"
        ) from error


def _checked(reader: "csv.DictReader[str]") -> Iterable[CurveRow]:
    """Yield the rows of a curves file. Raises ValueError, with the line, for one that no run writes."""
    names = list(reader.fieldnames or [])
    if names[:2] != ["stage", "step"] or len({*names}) != len(names):
        raise ValueError("line 1 is not its header")
    for row in reader:
        if None in row or None in row.values() or not _is_row(row):
            raise ValueError(f"line {reader.line_num} is no row of curves")
        yield row


def _is_row(row: Mapping[str, str]) -> bool:
    try:
        numbers = [float(value) for name, value in row.items() if name not in ("stage", "step") and value != ""]
    except ValueError:
        return False
    return row["stage"].isidentifier() and re.fullmatch(r"[0-9]{1,12}", row["step"]) is not None and bool(numbers)


def numbers(row: CurveRow) -> dict[str, float]:
    """Return the metrics of a row, without empty cells."""
    return {name: float(value) for name, value in row.items() if name not in ("stage", "step") and value != ""}
