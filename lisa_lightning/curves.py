"""`curves.csv`: the curves of a run on disk, whole after any interruption."""

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

from lisa_lightning.disk import explained, write_text

CurveRow = dict[str, str]


class Curves:
    """`curves.csv`: one row per stage and optimizer step, a column per metric, empty where nothing was measured.

    The step of a row is the number of finished optimizer steps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = ["stage", "step"]
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

    def forget(self, stage: str, after: int) -> None:
        """Drop a stage's rows later than step `after`: they will be computed again."""
        self._rewrite([r for r in self.rows() if r["stage"] != stage or int(r["step"]) <= after])

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


def read_rows(path: Path) -> list[CurveRow]:
    """The complete rows of a curves file, none where there is none: a killed run may have left half a line."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = [line for line in file if line.endswith("\n")]
    return [row for row in csv.DictReader(lines) if None not in row and None not in row.values()]
