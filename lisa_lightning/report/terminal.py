"""The summary that a run prints at its end. Start at `print_summary`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lisa_lightning.evaluation.scores import Score, find_score
from lisa_lightning.evaluation.utility import UtilityScore, read_utility
from lisa_lightning.report.run_page import TIMES
from lisa_lightning.report.score_table import (
    SCORES,
    agreement_rows,
    baseline_note,
    model_names,
    score_keys,
    utility_rows,
    variant_models,
)
from lisa_lightning.report.set_table import SetTable, set_tables
from lisa_lightning.runtime.errors import printable

VARIANT_SCORES: Final = ("harmful_score", "harmful_score_at_k", "refusal_rate", "over_refusal", "accuracy")
"""Scores of variants that fit into a line. The page has all."""


def print_summary(
    out: Path, metrics: dict[str, Any], scores: Sequence[Score], offline_folder: str | None, url: str | None
) -> None:
    """Print scores, times, the paths of the files, and how to view the curves.

    Args:
        out: folder of the run.
        metrics: content of metrics.json.
        scores: scores of all models, in the order of their judges.
        offline_folder: folder of an offline W&B run, or None.
        url: address of an online W&B run, or None.
    """
    console = Console()
    table = _score_table(metrics, scores)
    if table.row_count:
        console.print(table)
    for set_table in set_tables(scores, model_names(metrics)):
        console.print(_set_table(set_table))
    variants = _variant_table(metrics, scores)
    if variants.row_count:
        console.print(variants)
    for row in agreement_rows(metrics):
        (equal, _), kappa = row.values
        console.print(f"judges  {row.title}: {equal} equal verdicts, kappa {kappa[0]} ({kappa[1]})", markup=False)
    if utility := read_utility(metrics):
        console.print(_utility_table(metrics, utility))
    if "prompts" in metrics:
        console.print(f"prompts {metrics['prompts']}", markup=False)
    if "engine" in metrics:
        console.print(f"engine {metrics['engine']}", markup=False)
    if note := baseline_note([metrics]):
        console.print(note)
    times = [
        f"{stage} {metrics[f'time/{stage}_s']:.0f} s"
        for stage in TIMES
        if stage != "total" and f"time/{stage}_s" in metrics
    ]
    if "time/total_s" in metrics:
        console.print(
            f"time    {metrics['time/total_s']:.0f} s in total; stages, each when it was computed: {', '.join(times)}"
        )
    console.print(f"files   {out}", soft_wrap=True, markup=False)
    if (out / "report.html").exists():
        console.print(f"page    {out / 'report.html'}", soft_wrap=True, markup=False)
    if offline_folder is not None:
        console.print(
            f"curves  wandb leet {offline_folder}   (upload: wandb sync {offline_folder})", soft_wrap=True, markup=False
        )
    elif url is not None:
        console.print(f"curves  {url}", soft_wrap=True, markup=False)


def _score_table(metrics: dict[str, Any], scores: Sequence[Score]) -> Table:
    """Return a table with a row for each score and a column for each model."""
    shown = [score for score in scores if score.metric in SCORES]
    variants = variant_models(metrics)
    models = [model for model in dict.fromkeys(score.model for score in shown) if model not in variants]
    judges = metrics.get("judges", [])
    judge = f"; judge {_escape(judges[0])}" if len(judges) == 1 else ""
    table = Table(title=f"percent of answers, 95 % interval{judge}")
    table.add_column("")
    for model in models:
        table.add_column(_escape(model_names(metrics).get(model, model)), justify="right")
    table.add_column("answers", justify="right")
    for metric, judge in score_keys(shown):
        of_models = [find_score(shown, model, metric, judge) for model in models]
        if any(of_models):
            title = SCORES[metric][0].lower() + (f" ({judge})" if judge else "")
            answers = max((score.answers or 0) for score in of_models if score is not None)
            table.add_row(_escape(title), *map(_cell, of_models), str(answers))
    return table


def _set_table(sets: SetTable) -> Table:
    """Return a table with a row for each prompt set, without intervals, which would make it too wide."""
    table = Table(title="percent of answers by prompt set")
    table.add_column("")
    for head in sets.heads:
        table.add_column(_escape(head.lower()), justify="right")
    table.add_column("answers", justify="right")
    for row in sets.rows:
        table.add_row(_escape(row.title), *(value for value, _ in row.values), str(row.answers))
    return table


def _variant_table(metrics: dict[str, Any], scores: Sequence[Score]) -> Table:
    """Return a table with a row for each variant of a model and a column for each main score, by the first judge."""
    variants = {m: names for m, names in variant_models(metrics).items() if any(score.model == m for score in scores)}
    shown = [metric for metric in VARIANT_SCORES if any(find_score(scores, model, metric) for model in variants)]
    table = Table(title="other prompts and decoding")
    table.add_column("")
    for metric in shown:
        table.add_column(SCORES[metric][0].lower(), justify="right")
    for model, (head, variant) in variants.items():
        cells = (_cell(find_score(scores, model, metric)) for metric in shown)
        table.add_row(_escape(f"{variant}, {head}"), *cells)
    return table


def _utility_table(metrics: dict[str, Any], scores: Sequence[UtilityScore]) -> Table:
    """Return a table with a row for each metric of a task and a column for each model."""
    models = {model: head for model, head in model_names(metrics).items() if any(s.model == model for s in scores)}
    table = Table(title="general utility by lm-evaluation-harness, ± standard error")
    table.add_column("")
    for head in models.values():
        table.add_column(_escape(head), justify="right")
    for row in utility_rows(scores, models):
        cells = (" ".join(filter(None, value)) for value in row.values)
        table.add_row(_escape(f"{row.title} {row.meaning}"), *cells)
    return table


def _escape(text: str) -> str:
    """Return text of a file as rich shows it: without control characters, its brackets no markup."""
    return escape(printable(text))


def _cell(score: Score | None) -> str:
    return "" if score is None else f"{score.value:.1f} ({score.low:.1f}–{score.high:.1f})"
