"""`python -m experiments CLAIM [KEY=VALUE...]`: run a claim's sweep, keep its numbers, draw its picture.

Numbers are merged into experiments/CLAIM/results.csv, a line a run, so that a claim can be measured seed by seed.
"""

import csv
import subprocess
import sys
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Final

from lisa_lightning.cache import write_text
from lisa_lightning.report.drawing import save_png
from lisa_lightning.report.sweep import Run, in_order, read_runs, settings
from lisa_lightning.report.sweep_page import score_plots

ROOT: Final = Path(__file__).parents[1]
CLAIMS: Final = {
    "harmful_ratio": (["sweep=harmful_ratio", "method=sft,vlguard,bso,proximal,lisa"], ["method", "harmful_ratio"]),
    "rho": (["sweep=rho"], ["method", "method.rho"]),
    "step_split": (["sweep=step_split"], ["method", "split"]),
    "sample_number": (["sweep=sample_number"], ["method", "data.n"]),
    "learning_rate": (["sweep=learning_rate"], ["method", "optim.lr"]),
}
"""Claim -> what its sweep is told, and the keys that tell its runs apart beside the seed."""
SCORES: Final = ("harmful_score", "refusal_rate", "over_refusal", "accuracy")
MEASURED: Final = tuple(f"final/{s}{end}" for s in SCORES for end in ("", "_low", "_high", "_answers"))


def main(arguments: Sequence[str]) -> int:
    """The exit status: the sweep's."""
    if not arguments or arguments[0] not in CLAIMS:
        print(f"python -m experiments CLAIM [KEY=VALUE...]; claims: {', '.join(CLAIMS)}", file=sys.stderr)
        return 2
    claim, *more = arguments
    swept, keys = CLAIMS[claim]
    folder, out = ROOT / "multirun" / "claims" / claim, ROOT / "experiments" / claim
    command = [
        sys.executable,
        "run.py",
        "-m",
        "experiment=sst2_lisa",
        *swept,
        f"hydra.sweep.dir={folder}",
        *more,
    ]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    out.mkdir(exist_ok=True)
    if record(read_runs([folder]), keys, out / "results.csv"):
        draw(keys, out)
    return status


def record(runs: Sequence[Run], keys: Sequence[str], path: Path) -> bool:
    """Add finished runs to the lines, in place of those of the same setting and seed; whether there are any lines."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = {tuple(row[k] for k in (*keys, "seed")): row for row in csv.DictReader(file)}
    for run in runs:
        if run.status == "finished":
            own = {k: run.value(k) for k in (*keys, "seed")}
            numbers = {
                name.removeprefix("final/"): f"{run.metrics[name]:.4g}" for name in MEASURED if name in run.metrics
            }
            lines[tuple(own.values())] = own | numbers
    if not lines:
        return False
    text = StringIO()
    writer = csv.DictWriter(text, list(next(iter(lines.values()))), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines[k] for k in sorted(lines, key=lambda values: [in_order(v) for v in values]))
    write_text(path, text.getvalue())
    return True


def draw(keys: Sequence[str], out: Path) -> None:
    """plot.png of results.csv."""
    with (out / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = [
        Run(
            out,
            "finished",
            "",
            {k: row[k] for k in (*keys, "seed")},
            {"method": row["method"]},
            {f"final/{s}{end}": float(row[f"{s}{end}"]) for s in SCORES for end in ("", "_low", "_high")},
        )
        for row in rows
    ]
    save_png(score_plots(settings(runs, keys), keys)[:2], out / "plot.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
