"""The claim `defenses`: every defense at the best of three settings, and the best of their combinations.

Trials at one seed, on questions of their own, say which setting of a defense is measured at three seeds on the test
questions. An arm, one setting of a defense or of two, is an experiment file that is written for it. What a table holds
is not run again, so a measurement that was cut short goes on with the same command.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from experiments.pictures import ranked
from experiments.tables import SCORES, Rows, fill, merged, read, spread
from lisa_lightning.report.sweep_runs import Run, read_runs

VALIDATION: Final = (
    "source.harmful_prompts.path=embedded:harmful.jsonl",  # the user's rows are then from those before
    "source.harmful_prompts.skip=326",
    "source.test.path=${task.embedded.train}",
    "source.test.skip=1417",
)
"""As many requests and sentences as in the test, and none of them; the harmless requests are the test's, being few."""
TRIAL_SEED: Final = 0
SEEDS: Final = (1, 2, 3)
TRAINED: Final = ("curate", "align", "finetune", "reference", "repair")
"""Stages whose time and memory count."""
COMBINED: Final = ("align", "method", "repair")
"""Stages whose two best choices each are tried together."""
KEPT: Final = 3  # combinations that are measured


@dataclass(frozen=True)
class Arm:
    """One setting of a defense, or of two together."""

    defenses: tuple[str, ...]
    tuned: Mapping[str, float]
    """Key -> value; SFT has none."""
    choices: Mapping[str, str]
    fixed: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its experiment file."""
        return "-".join(["_".join(self.defenses), *(f"{v:g}" for v in self.tuned.values())]).replace("+", "")

    def __or__(self, other: "Arm") -> "Arm":
        """Both together."""
        return Arm(
            self.defenses + other.defenses,
            {**self.tuned, **other.tuned},
            {**self.choices, **other.choices},
            {**self.fixed, **other.fixed},
        )

    def write(self, folder: Path) -> None:
        """Its experiment file."""
        chosen = {"method": "sft", **self.choices}
        content = OmegaConf.create({"defaults": [{f"override /{group}": name} for group, name in chosen.items()]})
        for key, value in {**self.fixed, **self.tuned}.items():
            OmegaConf.update(content, key, value)
        (folder / f"{self.name}.yaml").write_text(f"# @package _global_\n{OmegaConf.to_yaml(content)}")


def arms(name: str, own: Mapping[str, Any]) -> list[Arm]:
    """The arms of a defense that are tried."""
    tuned = [{own["key"]: value} for value in own["values"]] if "key" in own else [{}]
    return [Arm((name,), values, own.get("choose", {}), own.get("set", {})) for values in tuned]


def measure(root: Path, more: Sequence[str]) -> int:
    """Run what is missing, write tables and picture into experiments/defenses; the exit status.

    Args:
        root: the project's folder.
        more: of the command line, for every sweep.
    """
    out = root / "experiments" / "defenses"
    loaded = OmegaConf.to_container(OmegaConf.load(out / "defenses.yaml"))
    assert isinstance(loaded, dict)
    defenses: dict[str, Any] = {str(name): own for name, own in loaded.items()}
    tuned = {name: arms(name, own) for name, own in defenses.items() if "like" not in own}

    def run(tried: Sequence[Arm], table: str, seeds: Sequence[int], *extra: str) -> Rows:
        return _measured(root, out / f"{table}.csv", tried, seeds, [*extra, *more])

    trials = run([arm for own in tuned.values() for arm in own], "trials", [TRIAL_SEED], *VALIDATION)
    chosen = {name: max(own, key=lambda arm: gain(trials, arm)) for name, own in tuned.items()}
    pairs = _pairs(chosen, trials)
    trials = run(pairs, "trials", [TRIAL_SEED], *VALIDATION)
    best = sorted(pairs, key=lambda arm: gain(trials, arm), reverse=True)[:KEPT]
    chosen |= {name: control(name, own, chosen[own["like"]]) for name, own in defenses.items() if "like" in own}
    shown = [chosen[name] for name in defenses]
    results = run([*shown, *best], "results", SEEDS)
    needs = {name: own.get("needs", "") for name, own in defenses.items()}
    fill(out / "README.md", table([*shown, *best], results, needs))
    ranked([(_said(arm), _of(results, arm)) for arm in (*shown, *best)], out / "plot.png")
    return 0


def gain(trials: Rows, arm: Arm) -> float:
    """What a trial does right less what it does wrong: accuracy minus harmful score minus over-refusal."""
    (row,) = _of(trials, arm)
    return float(row["accuracy"]) - float(row["harmful_score"]) - float(row["over_refusal"])


def _pairs(chosen: Mapping[str, Arm], trials: Rows) -> list[Arm]:
    """Each of the two best choices of a stage with each of those of another."""
    best: dict[str, list[Arm]] = {}
    for stage in COMBINED:
        own = [arm for arm in chosen.values() if stage in arm.choices]
        first: dict[str, Arm] = {}
        for arm in sorted(own, key=lambda arm: gain(trials, arm), reverse=True):
            first.setdefault(arm.choices[stage], arm)
        best[stage] = list(first.values())[:2]
    return [a | b for one, other in combinations(COMBINED, 2) for a in best[one] for b in best[other]]


def control(name: str, own: Mapping[str, Any], of: Arm) -> Arm:
    """The arm of a control: the value of what it is the control of, and its settings where it makes the same choice."""
    same = {} if "choose" in own else of.fixed
    return Arm((name,), of.tuned, own.get("choose", of.choices), {**same, **own.get("set", {})})


def _measured(root: Path, path: Path, tried: Sequence[Arm], seeds: Sequence[int], more: Sequence[str]) -> Rows:
    """The table at `path` with all arms at all seeds in it.

    Raises:
        SystemExit: a run failed; the others are in the table.
    """
    folder = root / "multirun" / "claims" / "defenses" / path.stem
    files = folder / "config" / "experiment" / "defenses"
    files.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    for seed in seeds:
        there = {row["arm"] for row in rows if row["seed"] == str(seed)}
        missing = [arm for arm in tried if arm.name not in there]
        for arm in missing:  # each in a process of its own, since memory left by others would count
            arm.write(files)
            command = [
                *(sys.executable, "run.py", "-m", "--config-dir", str(folder / "config")),
                *(f"hydra.sweep.dir={folder / arm.name}", f"experiment=defenses/{arm.name}"),
                *(f"seed={seed}", "evaluate.every=0", *more),
            ]
            status = subprocess.run(command, cwd=root, check=False).returncode
            rows = merged(path, [_row(run) for run in read_runs([folder]) if run.status == "finished"], ["arm"])
            if status:
                raise SystemExit(status)
    return rows


def _row(run: Run) -> dict[str, str]:
    found = run.metrics
    return {
        "arm": run.choices["experiment"].removeprefix("defenses/"),
        "seed": run.value("seed"),
        **{name: f"{found[f'final/{name}']:.4g}" for name in SCORES},
        "seconds": f"{sum(found.get(f'time/{stage}_s', 0.0) for stage in TRAINED):.4g}",
        "gib": f"{max(found.get(f'memory/{stage}_mib', 0.0) for stage in TRAINED) / 1024:.4g}",
    }


def _of(rows: Rows, arm: Arm) -> Rows:
    return [row for row in rows if row["arm"] == arm.name]


def _said(arm: Arm) -> str:
    return " + ".join(arm.defenses)


def table(shown: Sequence[Arm], rows: Rows, needs: Mapping[str, str]) -> str:
    """A line for each arm: its scores, its cost, what it needs."""
    names = ("harmful_score", "over_refusal", "accuracy", "seconds", "gib")
    heads = ("defense", "setting", "harmful score", "over-refusal", "accuracy", "time, s", "memory, GiB", "needs")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in shown:
        setting = ", ".join(f"{key}={value:g}" for key, value in arm.tuned.items())
        more = "; ".join(filter(None, dict.fromkeys(needs[name] for name in arm.defenses)))
        cells = (_said(arm), setting, *(spread(_of(rows, arm), name) for name in names), more)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nSeeds {', '.join(map(str, SEEDS))}: mean ± standard deviation, scores in percent."
