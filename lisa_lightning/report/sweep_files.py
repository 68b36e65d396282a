"""Files and terminal output of a sweep: sweep.csv, report.html, and the printed table. Start at `write_sweep`."""

import csv
import sys
import unicodedata
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from lisa_lightning.report.comparisons import Comparison, compare_settings, compared_scores
from lisa_lightning.report.score_table import SCORES, baseline_note
from lisa_lightning.report.search_section import search_lines
from lisa_lightning.report.searches import read_searches
from lisa_lightning.report.sweep_page import render_sweep_page
from lisa_lightning.report.sweep_runs import (
    Run,
    SeedGroup,
    failures,
    format_spread,
    inconsistent_inputs,
    mean_and_deviation,
    measured_scores,
    measured_utility,
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
        folders: folders of sweeps, or any folders above runs. Of two runs, the first is the baseline.
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
    groups = seed_groups(runs, keys)
    comparisons = compare_settings(groups, keys, folders[0] if len(folders) == 2 else None)
    searches = read_searches(folders, runs)
    with reraise_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / "sweep.csv", _csv(runs, [*keys, *dependent], out))
    write_text(out / "report.html", render_sweep_page(runs, keys, dependent, out, comparisons, searches))
    if groups:
        _print_tables(groups, keys, comparisons)
    for line in search_lines(searches):
        _console().print(f"search  {printable(line)}", soft_wrap=True, markup=False)
    _print_notes(runs, keys, dependent, out)
    return int(any(run.status == "failed" for run in runs))


def _csv(runs: Sequence[Run], keys: Sequence[str], out: Path) -> str:
    """Return one line per run: folder, status, cause, settings, seed, then every metric of metrics.json."""
    omitted = ("seed", "judges", "variants")
    names = list(dict.fromkeys(name for run in runs for name in run.metrics if name not in omitted))
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


def _print_tables(groups: Sequence[SeedGroup], keys: Sequence[str], comparisons: Sequence[Comparison]) -> None:
    """Print the table of scores with its baselines, and that of paired differences if there are any."""
    console = _console()
    console.print(_score_table(groups, keys))
    if measured_utility(groups):
        console.print(_utility_table(groups, keys))
    if note := baseline_note([run.metrics for group in groups for run in group.runs]):
        console.print(note)
    if comparisons:
        console.print(_comparison_table(comparisons))


def _print_notes(runs: Sequence[Run], keys: Sequence[str], dependent: Sequence[str], out: Path) -> None:
    """Print warnings about the comparison, failures, and the paths of the files."""
    console = _console()
    if dependent:
        console.print(f"varied  together with these settings: {', '.join(dependent)}", soft_wrap=True, markup=False)
    if inconsistent := inconsistent_inputs(seed_groups(runs, keys)):
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


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


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


def _utility_table(groups: Sequence[SeedGroup], keys: Sequence[str]) -> Any:
    """Return a table of rich with a row for each setting and a column for each metric of general utility."""
    from rich.table import Table

    names = measured_utility(groups)
    table = Table(title="general utility by lm-evaluation-harness, mean ± standard deviation over seeds")
    for key in keys:
        table.add_column(_escape_markup(key))
    table.add_column("runs", justify="right")
    for name in names:
        table.add_column(_escape_markup(" ".join(name)), justify="right")
    for group in groups:
        cells = (group.mean_utility(name) for name in names)
        table.add_row(*map(_escape_markup, group.values), str(len(group.runs)), *cells)
    return table


def _comparison_table(comparisons: Sequence[Comparison]) -> Any:
    """Return a table of rich with a row for each comparison and a column for each score."""
    from rich.table import Table

    scores = compared_scores(comparisons)
    table = Table(title="paired differences in percentage points, 95 % interval; p of McNemar's exact test")
    for head in ("setting", "baseline"):
        table.add_column(head)
    for head in ("pairs", *(SCORES[name][0].lower() for name in scores)):
        table.add_column(head, justify="right")
    for c in comparisons:
        cells = (str(c.scores[name]) if name in c.scores else "–" for name in scores)
        table.add_row(_escape_markup(c.setting), _escape_markup(c.baseline), str(c.runs), *cells)
    return table


def _escape_markup(text: str) -> str:
    """Return text as rich shows it: without control characters, its brackets no markup."""
    from rich.markup import escape

    return escape(printable(text))
