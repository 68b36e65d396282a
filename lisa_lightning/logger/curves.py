"""`curves.csv`: the curves of a run on disk, whole after any interruption."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import explained, read_text, write_text

CurveRow = dict[str, str]


class Curves:
    """`curves.csv`: one row per stage and optimizer step, a column per metric, empty where nothing was measured.

    The step of a row is the number of finished optimizer steps.

    Raises:
        UserError: if the file is there already and broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["stage", "step"]
        self._hashes: dict[str, Any] = {}
        rows = self.rows()
        if rows:
            self.columns = list(rows[0])
            self._rewrite(rows)

    def rows(self, stage: str | None = None) -> list[CurveRow]:
        """All complete rows, or those of one stage, as text."""
        return [r for r in read_rows(self.path) if stage is None or r["stage"] == stage]

    def append(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """Add one row, on disk when this returns."""
        new = [name for name in metrics if name not in self.columns]
        if new or not self.path.exists():
            rows = self.rows()
            self.columns += new
            self._rewrite(rows)
        with explained(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(
                {"stage": stage, "step": step} | metrics
            )
        self._hash(stage).update(_canonical({"step": step} | metrics))

    def flush(self) -> None:
        """Have the disk hold all rows."""
        if self.path.exists():
            with explained(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def digest(self, stage: str) -> str:
        """Return a hash of all rows of a stage, which a checkpoint carries so that lost rows are noticed."""
        return self._hash(stage).hexdigest()

    def _hash(self, stage: str) -> Any:
        if stage not in self._hashes:
            self._hashes[stage] = hashlib.sha256()
        return self._hashes[stage]

    def forget(self, stage: str, after: int) -> None:
        """Drop a stage's rows later than step `after`: they will be computed again."""
        rows = [r for r in self.rows() if r["stage"] != stage or int(r["step"]) <= after]
        self._rewrite(rows)
        self._hashes[stage] = hashlib.sha256()
        for row in rows:
            if row["stage"] == stage:
                self._hashes[stage].update(_canonical(row))

    def insert(self, rows: Sequence[CurveRow]) -> None:
        """Take over the rows of a finished stage, in place of those that are here."""
        self.columns += [name for name in rows[0] if name not in self.columns]
        self._rewrite([*(r for r in self.rows() if r["stage"] != rows[0]["stage"]), *rows])

    def export(self, stage: str, path: Path) -> None:
        """Write one stage's rows to another file."""
        _write_rows(path, self.columns, self.rows(stage))

    def _rewrite(self, rows: Sequence[CurveRow]) -> None:
        _write_rows(self.path, self.columns, rows)


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
