"""`python -m experiments CLAIM [KEY=VALUE...]`: run a claim's sweep, keep its numbers, draw its picture.

Numbers are merged into experiments/CLAIM/results.csv, a line a run, so that a claim can be measured seed by seed; of a
claim about the course of training also into curves.csv, a line a point.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from experiments.pictures import course, one_each
from experiments.tables import SCORES, Rows, by_key, fill, merged
from experiments.tuned import measure
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.report.svg import Plot, save_png
from lisa_lightning.report.sweep_page import score_plots
from lisa_lightning.report.sweep_runs import Run, read_runs, seed_groups
from lisa_lightning.runtime.errors import UserError

ROOT: Final = Path(__file__).parents[1]
SCORED: Final = tuple(f"final/{s}{end}" for s in SCORES for end in ("", "_low", "_high", "_answers"))


@dataclass(frozen=True)
class Claim:
    """What a claim's sweep is told, and what is kept of it."""

    sweep: Sequence[str]
    keys: Sequence[str]
    """Tell its runs apart, beside the seed."""
    measured: Sequence[str] = SCORED
    """Of metrics.json."""
    curves: Sequence[str] = ()
    """Of curves.csv."""
    apart: Sequence[str] = ()
    """Swept too, but each combination in a process of its own: runs before it leave memory behind in one."""


METHODS: Final = "method=sft,vlguard,bso,proximal,lisa"
CLAIMS: Final = {
    "harmful_ratio": Claim(["sweep=harmful_ratio", METHODS], ["method", "harmful_ratio"]),
    "rho": Claim(["sweep=rho"], ["method", "method.rho"]),
    "step_split": Claim(["sweep=step_split"], ["method", "split"]),
    "sample_number": Claim(["sweep=sample_number"], ["method", "data.n"]),
    "learning_rate": Claim(["sweep=learning_rate"], ["method", "optim.lr"]),
    "excess_drift": Claim(
        ["method=bso,lisa", "seed=1,2,3", "evaluate.every=10", "evaluate.gradient_rows=24"],
        ["method"],
        curves=("switch/drift", "eval/alignment_loss", "eval/gradient_norm"),
    ),
    "cost": Claim(
        ["optim.steps=60", "evaluate.every=0", "stages=[align,finetune]"],
        ["method"],
        measured=("train/steps", "time/finetune_s", "memory/finetune_mib"),
        apart=["seed=1,2,3", "method=sft,bso,lisa"],  # in turn, as the machine's speed varies
    ),
    "public_rows": Claim(
        ["--config-dir", "experiments/public_rows", "+public=sst2,agnews", METHODS, "seed=1,2,3", "evaluate.every=0"],
        ["method", "task"],
        measured=(*SCORED, "final/linear/harmful_score", "final/lenient_accuracy"),
    ),
}


def main(arguments: Sequence[str]) -> int:
    """The exit status: the sweep's."""
    if not arguments or arguments[0] not in (*CLAIMS, "defenses"):
        print(f"python -m experiments CLAIM [KEY=VALUE...]; claims: {', '.join(CLAIMS)}, defenses", file=sys.stderr)
        return 2
    name, *more = arguments
    if name == "defenses":
        return measure(ROOT, more)
    claim, folder, out = CLAIMS[name], ROOT / "multirun" / "claims" / name, ROOT / "experiments" / name
    parted = (override.partition("=") for override in claim.apart)
    each = product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in parted))
    command = [sys.executable, "run.py", "-m", *claim.sweep, "experiment=sst2_lisa", f"hydra.sweep.dir={folder}"]
    ends = [subprocess.run([*command, *one, *more], cwd=ROOT, check=False).returncode for one in each]
    status = max(ends, key=abs)  # a signal's is below 0
    if status not in (0, 1):  # refused before any run
        return status
    out.mkdir(exist_ok=True)
    runs = [run for run in read_runs([folder]) if run.status == "finished"]
    lines = {name: lines_of(runs, claim) for name, lines_of in (("results", _results), ("curves", _curves))}
    found = {name: merged(out / f"{name}.csv", new, claim.keys) for name, new in lines.items() if new}
    if "results" in found:
        fill(out / "README.md", by_key(found["results"], claim.keys))
        save_png(_plots(claim, found), out / "plot.png")
    return status


def _results(runs: Sequence[Run], claim: Claim) -> Rows:
    return [
        {k: run.value(k) for k in (*claim.keys, "seed")}
        | {m.removeprefix("final/"): f"{run.metrics[m]:.4g}" for m in claim.measured if m in run.metrics}
        for run in runs
    ]


def _curves(runs: Sequence[Run], claim: Claim) -> Rows:
    return [
        {k: run.value(k) for k in (*claim.keys, "seed")}
        | {"step": row["step"]}
        | {name: f"{float(row[name]):.4g}" if row.get(name) else "" for name in claim.curves}
        for run in (runs if claim.curves else ())
        for row in read_rows(run.folder / "curves.csv")
        if row["stage"] == "finetune" and any(row.get(name) for name in claim.curves)
    ]


def _plots(claim: Claim, found: dict[str, Rows]) -> list[Plot]:
    results = found["results"]
    if "curves" in found:
        return [course(found["curves"], name) for name in claim.curves]
    if claim.measured[0] not in SCORED:
        seconds = [r | {"s": str(float(r["time/finetune_s"]) / float(r["train/steps"]))} for r in results]
        memory = [r | {"gib": str(float(r["memory/finetune_mib"]) / 1024)} for r in results]
        return [one_each(seconds, "s", "Time of a step", "seconds"), one_each(memory, "gib", "Peak memory", "GiB")]
    scores = [f"{s}{end}" for s in SCORES for end in ("", "_low", "_high")]
    runs = [
        Run(
            Path(),
            "finished",
            "",
            {"stages": ["finetune"], **{k: row[k] for k in (*claim.keys, "seed")}},
            {k: row[k] for k in ("method", "task") if k in row},
            {f"final/{s}": float(row[s]) for s in scores},
        )
        for row in results
    ]
    return score_plots(seed_groups(runs, claim.keys), claim.keys)[:2]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(str(error))
