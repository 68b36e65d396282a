"""The small table at the end of a run."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = {
    "harmful_score": "harmful score",
    "refusal_rate": "refusal rate",
    "over_refusal": "over-refusal",
    "accuracy": "accuracy",
}


def terminal(out: Path, metrics: dict[str, Any], offline_folder: str | None, url: str | None) -> None:
    """Print scores before and after, time, where the files are, and how to look at the curves."""
    console = Console()
    scored = Table(title="percent of held-out prompts")
    scored.add_column("")
    scored.add_column("aligned model", justify="right")
    scored.add_column("after fine-tuning", justify="right")
    for name, title in SHOWN.items():
        values = [metrics.get(f"{stage}/{name}") for stage in ("aligned", "final")]
        if any(v is not None for v in values):
            scored.add_row(title, *("" if v is None else f"{v:.1f}" for v in values))
    if scored.row_count:
        console.print(scored)
    times = [
        f"{stage} {metrics[f'time/{stage}_s']:.0f} s"
        for stage in ("align", "finetune", "evaluate")
        if f"time/{stage}_s" in metrics
    ]
    console.print(f"time    {metrics['time/total_s']:.0f} s in all ({', '.join(times)}; cached stages as first run)")
    console.print(f"files   {out}", soft_wrap=True)
    console.print(f"page    {out / 'report.html'}", soft_wrap=True)
    if offline_folder is not None:
        console.print(f"curves  wandb leet {offline_folder}   (upload: wandb sync {offline_folder})", soft_wrap=True)
    elif url is not None:
        console.print(f"curves  {url}", soft_wrap=True)
