"""Files and terminal output of a sweep: sweep.csv, report.html, and the printed table. Start at `write_sweep`."""

import csv
import sys
import unicodedata
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lisa_lightning.report.score_table import SCORES
from lisa_lightning.report.sweep_page import render_sweep_page
from lisa_lightning.report.sweep_runs import (
    Run,
    SeedGroup,
    failures,
    format_spread,
    inconsistent_inputs,
    mean_and_deviation,
    measured_scores,
    read_runs,
    relative_path,
    seed_groups,
    swept_keys,
)
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import reraise_write_errors, write_text


def write_sweep(folders: Sequence[Path], out: Path) -> int:
    """Write sweep.csv and report.html, and print the table and the failures.

    Args:
        folders: folders of sweeps, or any folders above runs.
        out: folder for both files.

    Returns:
        1 if a run failed, else 0.

    Raises:
        UserError: if the folders hold no run, or if `out` is the folder of a single run, which has a page already.
    """
    if (out / "config.yaml").exists():
        raise UserError(
            f"{out}: it is the folder of one run, which has a page ({out / 'report.html'}). "
            "Fix: name the folder above it"
        )
    runs = read_runs(folders)
    keys, dependent = swept_keys(runs)
    with reraise_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "sweep.csv", _csv(runs, [*keys, *dependent], out))
    write_text(out / "report.html", render_sweep_page(runs, keys, dependent, out))
    _print(runs, keys, dependent, out)
    return int(any(run.status == "failed" for run in runs))


def _csv(runs: Sequence[Run], keys: Sequence[str], out: Path) -> str:
    """Return one line per run: folder, status, cause, settings, seed, then every metric of metrics.json."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics if name not in ("seed", "judges")))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_escape_formula, ["folder", "status", "cause", *keys, "seed", *names]))
    for run in runs:
        settings = [run.value(k) for k in keys]
        cells = [relative_path(run.folder, out), run.status, run.cause, *settings, run.value("seed")]
        writer.writerow(map(_escape_formula, [*cells, *(run.metrics.get(name, "") for name in names)]))
    return text.getvalue()


def _escape_formula(cell: Any) -> Any:
    """Return a cell that a spreadsheet shows as text: an apostrophe precedes what looks like a formula."""
    # Spreadsheets treat full-width signs as signs, and skip blanks before them.
    if not isinstance(cell, str) or _is_number(cell):
        return cell
    if unicodedata.normalize("NFKC", cell).lstrip()[:1] not in {"=", "+", "-", "@"} and cell[:1] not in {
        "\t",
        "\r",
        "\n",
    }:
        return cell
    return f"'{cell}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _print(runs: Sequence[Run], keys: Sequence[str], dependent: Sequence[str], out: Path) -> None:
    """Print the score table, warnings about the comparison, failures, and the paths of the files."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    groups = seed_groups(runs, keys)
    if groups:
        console.print(_score_table(groups, keys))
    if dependent:
        console.print(f"varied  together with these settings: {', '.join(dependent)}", soft_wrap=True, markup=False)
    if inconsistent := inconsistent_inputs(groups):
        console.print(f"unequal over seeds: {', '.join(inconsistent)}", soft_wrap=True, markup=False)
    for cause, failed in failures(runs).items():
        paths = printable(", ".join(relative_path(run.folder, out) for run in failed))
        console.print(f"failed  {len(failed)} ({paths})", soft_wrap=True, markup=False)
        console.print(f"        {printable(cause)}", soft_wrap=True, markup=False)
    unfinished = sum(run.status == "unfinished" for run in runs)
    if unfinished:
        console.print(f"begun   {unfinished} run(s), not finished. Repeat the command to continue them")
    console.print(f"table   {out / 'sweep.csv'}", soft_wrap=True, markup=False)
    console.print(f"page    {out / 'report.html'}", soft_wrap=True, markup=False)


def _score_table(groups: Sequence[SeedGroup], keys: Sequence[str]) -> Any:
    """Return a table of rich with a row for each setting and a column for each key and score."""
    from rich.table import Table

    scores = measured_scores(groups)
    table = Table(title="percent of answers, mean ± standard deviation over seeds")
    for key in keys:
        table.add_column(_escape_markup(key))
    for head in ("runs", *(SCORES[name][0].lower() for name in scores)):
        table.add_column(head, justify="right", no_wrap=True)
    for group in groups:
        spreads = (format_spread(group.spread(name), mean_and_deviation) for name in scores)
        table.add_row(*map(_escape_markup, group.values), str(len(group.runs)), *spreads)
    return table


def _escape_markup(text: str) -> str:
    """Return text as rich shows it: without control characters, its brackets no markup."""
    from rich.markup import escape

    return escape(printable(text))
