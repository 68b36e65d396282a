"""What a sweep leaves: sweep.csv, report.html, and the table in the terminal."""

import csv
import sys
import unicodedata
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lisa_lightning.report.score_table import SCORES
from lisa_lightning.report.sweep_page import sweep_page
from lisa_lightning.report.sweep_runs import (
    Run,
    causes,
    cell,
    mean_and_deviation,
    read_runs,
    relative,
    scores_shown,
    seed_groups,
    swept,
    unlike,
)
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import explained, write_text


def leave(folders: Sequence[Path], out: Path) -> int:
    """Write sweep.csv and report.html, print the table and what failed; 1 where anything did.

    Raises:
        UserError: the folders hold no run, or `out` is a run's own folder, which has a page already.
    """
    if (out / "config.yaml").exists():
        raise UserError(f"{out} is one run's folder, whose page is {out / 'report.html'}; name the folder above it")
    runs = read_runs(folders)
    keys, rest = swept(runs)
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "sweep.csv", _table(runs, [*keys, *rest], out))
    write_text(out / "report.html", sweep_page(runs, keys, rest, out))
    _print(runs, keys, rest, out)
    return int(any(run.status == "failed" for run in runs))


def _table(runs: Sequence[Run], keys: Sequence[str], out: Path) -> str:
    """A line a run: folder, status, settings, seed, then every metric of its metrics.json."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics if name not in ("seed", "judges")))
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_inert, ["folder", "status", "cause", *keys, "seed", *names]))
    for run in runs:
        settings = [run.value(k) for k in keys]
        cells = [relative(run.folder, out), run.status, run.cause, *settings, run.value("seed")]
        writer.writerow(map(_inert, [*cells, *(run.metrics.get(name, "") for name in names)]))
    return text.getvalue()


def _inert(cell: Any) -> Any:
    """Return a cell so that a spreadsheet shows it: text that begins as a formula does gets an apostrophe."""
    # Spreadsheets take full-width signs as signs, and skip blanks before them.
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


def _shown(text: str) -> str:
    """Return text as a table of rich shows it: without control characters, its brackets no markup."""
    from rich.markup import escape

    return escape(printable(text))


def _print(runs: Sequence[Run], keys: Sequence[str], rest: Sequence[str], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    groups = seed_groups(runs, keys)
    names = scores_shown(groups)
    if groups:
        scored = Table(title="percent of answers, mean ± standard deviation over seeds")
        for key in keys:
            scored.add_column(_shown(key))
        for name in ("runs", *(SCORES[n][0].lower() for n in names)):
            scored.add_column(name, justify="right", no_wrap=True)
        for group in groups:
            spreads = (cell(group.spread(name), mean_and_deviation) for name in names)
            scored.add_row(*map(_shown, group.values), str(len(group.runs)), *spreads)
        console.print(scored)
    if rest:
        console.print(f"with these differ too: {', '.join(rest)}", soft_wrap=True, markup=False)
    if found := unlike(groups):
        console.print(f"unlike  over seeds these differ too: {', '.join(found)}", soft_wrap=True, markup=False)
    for cause, failed in causes(runs).items():
        names_of = printable(", ".join(relative(run.folder, out) for run in failed))
        console.print(f"failed  {len(failed)} ({names_of})", soft_wrap=True, markup=False)
        console.print(f"        {printable(cause)}", soft_wrap=True, markup=False)
    begun = sum(run.status == "unfinished" for run in runs)
    if begun:
        console.print(f"begun   {begun} run(s) that are not finished; the same command goes on with them")
    console.print(f"table   {out / 'sweep.csv'}", soft_wrap=True, markup=False)
    console.print(f"page    {out / 'report.html'}", soft_wrap=True, markup=False)
