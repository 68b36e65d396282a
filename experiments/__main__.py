"""`python -m experiments CLAIM [KEY=VALUE...]`: run the sweep of a claim, store its numbers, draw its picture.

Numbers are merged into experiments/CLAIM/results.csv, one line per run, so that a claim can be measured seed by seed.
Verdicts by prompt are stored next to it (`experiments.verdicts`), for paired differences.
Claims about curves also have a curves.csv, one line per point. Start at `main` and `CLAIMS`.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final

from experiments.pictures import method_plot, step_plot
from experiments.tables import (
    BASELINES,
    SCORES,
    UNTRAINED,
    Rows,
    baseline_table,
    comparison_table,
    fill,
    format_table,
    merge,
    read,
)
from experiments.tuned import measure
from experiments.untrained import measure_untrained
from experiments.verdicts import read_verdicts, stored_runs, write_verdicts
from experiments.worst_cases import measure_attacks
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.report.comparisons import compare_settings
from lisa_lightning.report.svg import Plot, save_png
from lisa_lightning.report.sweep_page import score_plots
from lisa_lightning.report.sweep_runs import Run, read_runs, seed_groups
from lisa_lightning.runtime.errors import UserError

ROOT: Final = Path(__file__).parents[1]
SCORED: Final = (*(f"final/{s}{end}" for s in SCORES for end in ("", "_low", "_high", "_answers")), *BASELINES)


@dataclass(frozen=True)
class Claim:
    """The sweep of a claim, and the columns that its tables store."""

    sweep: Sequence[str]
    """Arguments of the command."""
    keys: Sequence[str]
    """Keys that distinguish its runs, besides the seed."""
    measured: Sequence[str] = SCORED
    """Names in metrics.json."""
    curves: Sequence[str] = ()
    """Columns of curves.csv."""
    separate: Sequence[str] = ()
    """Swept values whose combinations each need a separate process, since earlier runs leave memory allocated."""
    primary: Sequence[str] = ()
    """Setting and baseline of the comparison of harmful scores that decides, named before it is measured."""
    rows: Sequence[str] = ()
    """Arguments that select other rows than the embedded ones, in addition to `sweep`."""
    more: Sequence[Sequence[str]] = ()
    """Overrides of further sweeps into the same folder, which run unless the command has overrides of its own."""

    @property
    def about_scores(self) -> bool:
        """True if the claim is about scores."""
        return tuple(self.measured[: len(SCORED)]) == SCORED


METHODS: Final = "method=sft,vlguard,bso,proximal,lisa"
CLAIMS: Final = {
    "harmful_ratio": Claim(
        ["sweep=harmful_ratio", METHODS, "align.seed=${seed}"],
        ["method", "harmful_ratio"],
        primary=("lisa, harmful_ratio 0.1", "sft, harmful_ratio 0.1"),
        more=[["harmful_ratio=0.1", "seed=4,5"]],  # the primary comparison has five seeds
    ),
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
        separate=["seed=1,2,3", "method=sft,bso,lisa"],  # methods alternate, as the machine's speed varies
    ),
    "public_rows": Claim(
        [METHODS, "seed=1,2,3", "evaluate.every=0"],
        ["method", "task"],
        measured=(*SCORED, "final/linear/harmful_score", "final/lenient_accuracy"),
        rows=["--config-dir", "experiments/public_rows", "+public=sst2,agnews"],
    ),
}


def main(arguments: Sequence[str]) -> int:
    """Measure a claim and write its files.

    Args:
        arguments: name of the claim, then overrides for its sweep.

    Returns:
        The exit status of the sweep, 2 for an unknown claim.
    """
    others = {"defenses": measure, "attacks": measure_attacks}
    if not arguments or arguments[0] not in (*CLAIMS, *others):
        print(f"python -m experiments CLAIM [KEY=VALUE...]; claims: {', '.join((*CLAIMS, *others))}", file=sys.stderr)
        return 2
    name, *overrides = arguments
    if name in others:
        return others[name](ROOT, overrides)
    claim, folder, out = CLAIMS[name], ROOT / "multirun" / "claims" / name, ROOT / "experiments" / name
    pairs = (override.partition("=") for override in claim.separate)
    combinations = product(*([f"{key}={value}" for value in values.split(",")] for key, _, values in pairs))
    if claim.primary:
        print(f"primary comparison: harmful score of {claim.primary[0]} minus that of {claim.primary[1]}")
    command = [
        sys.executable,
        "run.py",
        "-m",
        *claim.rows,
        *claim.sweep,
        "experiment=sst2_lisa",
        f"hydra.sweep.dir={folder}",
    ]
    further = ([],) if overrides else ([], *claim.more)
    statuses = [
        subprocess.run([*command, *combination, *more, *overrides], cwd=ROOT, check=False).returncode
        for combination, more in product(combinations, further)
    ]
    status = max(statuses, key=abs)  # a signal's is below 0
    if status not in (0, 1):  # refused before any run
        return status
    if claim.about_scores:
        status = max(status, measure_untrained(ROOT, name, claim.rows, overrides), key=abs)
    out.mkdir(exist_ok=True)
    runs = [run for run in read_runs([folder]) if run.status == "finished"]
    new_rows = {name: rows_of(runs, claim) for name, rows_of in (("results", _results), ("curves", _curves))}
    tables = {name: merge(out / f"{name}.csv", new, claim.keys) for name, new in new_rows.items() if new}
    if claim.about_scores:
        write_verdicts(out, runs, [_setting(run, claim) for run in runs])
    if "results" in tables:
        fill(out / "README.md", format_results(out, claim))
        save_png(_plots(claim, tables), out / "plot.png")
    return status


def format_results(folder: Path, claim: Claim) -> str:
    """Return the Markdown tables of a claim: scores, baselines, and paired differences if verdicts are stored."""
    rows = read(folder / "results.csv")
    tables = [format_table(rows, claim.keys), baseline_table(rows, read(folder / UNTRAINED))]
    verdicts = read_verdicts(folder, [*claim.keys, "seed"])
    if verdicts:
        runs = stored_runs(rows, claim.keys, verdicts)
        comparisons = compare_settings(seed_groups(runs, claim.keys), claim.keys)
        tables += [comparison_table(comparisons, claim.primary)] if comparisons else []
    return "\n\n".join(filter(None, tables))


def _setting(run: Run, claim: Claim) -> dict[str, str]:
    return {k: run.value(k) for k in (*claim.keys, "seed")}


def _results(runs: Sequence[Run], claim: Claim) -> Rows:
    return [
        _setting(run, claim)
        | {m.removeprefix("final/"): f"{run.metrics[m]:.4g}" for m in claim.measured if m in run.metrics}
        for run in runs
    ]


def _curves(runs: Sequence[Run], claim: Claim) -> Rows:
    return [
        _setting(run, claim)
        | {"step": row["step"]}
        | {name: f"{float(row[name]):.4g}" if row.get(name) else "" for name in claim.curves}
        for run in (runs if claim.curves else ())
        for row in read_rows(run.folder / "curves.csv")
        if row["stage"] == "finetune" and any(row.get(name) for name in claim.curves)
    ]


def _plots(claim: Claim, tables: dict[str, Rows]) -> list[Plot]:
    """Return the plots of a claim: curves, costs, or scores against the swept keys."""
    results = tables["results"]
    if "curves" in tables:
        return [step_plot(tables["curves"], column) for column in claim.curves]
    if not claim.about_scores:
        seconds = [r | {"s": str(float(r["time/finetune_s"]) / float(r["train/steps"]))} for r in results]
        memory = [r | {"gib": str(float(r["memory/finetune_mib"]) / 1024)} for r in results]
        return [
            method_plot(seconds, "s", "Time of a step", "seconds"),
            method_plot(memory, "gib", "Peak memory", "GiB"),
        ]
    return score_plots(seed_groups(stored_runs(results, claim.keys, {}), claim.keys), claim.keys)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(str(error))
