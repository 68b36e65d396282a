"""Scores of the untrained model, which is neither aligned nor fine-tuned: `measure_untrained`, in untrained.csv."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from experiments.tables import SCORES, UNTRAINED, merge
from lisa_lightning.report.sweep_runs import read_runs

PASSED_ON: Final = ("model", "source", "task", "evaluate", "judge")
"""Config groups whose overrides concern a model that is not trained."""


def measure_untrained(root: Path, name: str, rows: Sequence[str], overrides: Sequence[str]) -> int:
    """Evaluate the untrained model on the held-out prompts of a claim, and merge its scores into untrained.csv.

    A finished run is not repeated.

    Args:
        root: folder of the project.
        name: name of the claim.
        rows: arguments that select the rows of the claim.
        overrides: overrides of the claim's command.

    Returns:
        The exit status of the command.
    """
    folder = root / "multirun" / "claims" / "untrained" / name
    command = [
        *(sys.executable, "run.py", "-m", *rows, "experiment=sst2_lisa", f"hydra.sweep.dir={folder}"),
        "stages=[evaluate,judge]",
        *(override for override in overrides if override.partition("=")[0].partition(".")[0] in PASSED_ON),
    ]
    status = subprocess.run(command, cwd=root, check=False).returncode
    if status == 0:
        measured = [
            {"task": run.value("task"), "seed": run.value("seed")}
            | {score: f"{run.metrics[f'aligned/{score}']:.4g}" for score in SCORES}
            for run in read_runs([folder])
            if run.status == "finished"
        ]
        out = root / "experiments" / name
        out.mkdir(exist_ok=True)
        merge(out / UNTRAINED, measured, ["task"])
    return status
