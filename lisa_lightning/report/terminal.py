"""The summary that a run prints at its end. Start at `print_summary`."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lisa_lightning.report.run_page import TIMES
from lisa_lightning.report.score_table import SCORES, model_names, score_keys
from lisa_lightning.runtime.errors import printable


def print_summary(out: Path, metrics: dict[str, Any], offline_folder: str | None, url: str | None) -> None:
    """Print scores, times, the paths of the files, and how to view the curves.

    Args:
        out: folder of the run.
        metrics: content of metrics.json.
        offline_folder: folder of an offline W&B run, or None.
        url: address of an online W&B run, or None.
    """
    console = Console()
    scores = _score_table(metrics)
    if scores.row_count:
        console.print(scores)
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


def _score_table(metrics: dict[str, Any]) -> Table:
    """Return a table with a row for each score and a column for each model."""
    models = [s for s in dict.fromkeys(name.partition("/")[0] for name in metrics) if _is_scored(metrics, s)]
    judges = metrics.get("judges", [])
    judge = f"; judge {_escape(judges[0])}" if len(judges) == 1 else ""
    table = Table(title=f"percent of answers, 95 % interval{judge}")
    table.add_column("")
    for model in models:
        table.add_column(_escape(model_names(metrics).get(model, model)), justify="right")
    table.add_column("answers", justify="right")
    for name, judge in score_keys(metrics):
        key = f"{judge}/{name}" if judge else name
        if any(f"{model}/{key}" in metrics for model in models):
            counts = [metrics.get(f"{model}/{key}_answers", 0) for model in models]
            title = SCORES[name][0].lower() + (f" ({judge})" if judge else "")
            table.add_row(_escape(title), *(_cell(metrics, f"{model}/{key}") for model in models), str(max(counts)))
    return table


def _escape(text: str) -> str:
    """Return text of a file as rich shows it: without control characters, its brackets no markup."""
    return escape(printable(text))


def _is_scored(metrics: dict[str, Any], model: str) -> bool:
    return any(f"{model}/{name}" in metrics for name in SCORES)


def _cell(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return ""
    return f"{metrics[name]:.1f} ({metrics[f'{name}_low']:.1f}–{metrics[f'{name}_high']:.1f})"
