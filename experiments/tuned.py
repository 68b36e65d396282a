"""The claim `defenses`: every defense at the best of three settings, and the best of their combinations.

Trials at one seed, on separate validation questions, select the setting of a defense. It is then measured at three
seeds on the test questions. An arm is one setting of one or two defenses, run from an experiment file written for it.
Arms in a table are not run again, so the same command continues an interrupted measurement.

Start at `measure` and `Arm`.
"""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from omegaconf import OmegaConf

from experiments.pictures import write_ranking
from experiments.tables import (
    BASELINES,
    SCORES,
    UNTRAINED,
    Rows,
    baseline_table,
    comparison_table,
    fill,
    merge,
    read,
    spread,
)
from experiments.untrained import measure_untrained
from experiments.verdicts import read_verdicts, stored_runs, write_verdicts
from lisa_lightning.report.comparisons import Comparison, compare_groups
from lisa_lightning.report.sweep_runs import Run, SeedGroup, read_runs

VALIDATION: Final = (
    "source.harmful_prompts.path=embedded:harmful.jsonl",  # user rows come from the first 326
    "source.harmful_prompts.skip=326",
    "source.test.path=${task.embedded.train}",
    "source.test.skip=1417",
)
"""Overrides for validation questions: as many requests and sentences as in the test set, without overlap.

Harmless requests are those of the test set, since there are few.
"""
TRIAL_SEED: Final = 0
SEEDS: Final = (1, 2, 3)
TRAINED: Final = ("curate", "align", "finetune", "reference", "repair")
"""Stages whose time and memory count."""
COMBINED: Final = ("align", "method", "repair")
"""Stages whose two best choices each are combined in pairs."""
MAX_COMBINATIONS: Final = 3
"""Combinations that are measured on the test questions."""


@dataclass(frozen=True)
class Arm:
    """One setting of a defense, or of two combined."""

    defenses: tuple[str, ...]
    tuned: Mapping[str, float]
    """Tuned key -> value; empty for SFT."""
    choices: Mapping[str, str]
    """Config group -> choice."""
    fixed: Mapping[str, Any]
    """Further config keys -> values."""

    @property
    def name(self) -> str:
        """Name of the experiment file."""
        return "-".join(["_".join(self.defenses), *(f"{v:g}" for v in self.tuned.values())]).replace("+", "")

    def __or__(self, other: "Arm") -> "Arm":
        """Return the combination of two arms."""
        return Arm(
            self.defenses + other.defenses,
            {**self.tuned, **other.tuned},
            {**self.choices, **other.choices},
            {**self.fixed, **other.fixed},
        )

    def write(self, folder: Path) -> None:
        """Write the experiment file."""
        choices = {"method": "sft", **self.choices}
        content = OmegaConf.create({"defaults": [{f"override /{group}": name} for group, name in choices.items()]})
        for key, value in {**self.fixed, **self.tuned}.items():
            OmegaConf.update(content, key, value)
        (folder / f"{self.name}.yaml").write_text(f"# @package _global_\n{OmegaConf.to_yaml(content)}")


def arms(name: str, entry: Mapping[str, Any]) -> list[Arm]:
    """Return the arms of a defense to try.

    Args:
        name: name of the defense.
        entry: its entry in defenses.yaml, with `choose`, `set`, `key` and `values`, all optional.
    """
    tuned = [{entry["key"]: value} for value in entry["values"]] if "key" in entry else [{}]
    return [Arm((name,), values, entry.get("choose", {}), entry.get("set", {})) for values in tuned]


def measure(root: Path, overrides: Sequence[str]) -> int:
    """Run the missing arms, and write tables and picture into experiments/defenses.

    Args:
        root: folder of the project.
        overrides: further overrides for every sweep.

    Returns:
        0, the exit status.

    Raises:
        SystemExit: if a run failed.
    """
    out = root / "experiments" / "defenses"
    loaded = OmegaConf.to_container(OmegaConf.load(out / "defenses.yaml"))
    assert isinstance(loaded, dict)
    entries: dict[str, Any] = {str(name): entry for name, entry in loaded.items()}
    candidates = {name: arms(name, entry) for name, entry in entries.items() if "like" not in entry}

    def run(needed: Sequence[Arm], table: str, seeds: Sequence[int], *extra: str) -> Rows:
        return _complete_table(root, out / f"{table}.csv", needed, seeds, [*extra, *overrides])

    trials = run([arm for tried in candidates.values() for arm in tried], "trials", [TRIAL_SEED], *VALIDATION)
    best = {name: max(tried, key=lambda arm: gain(trials, arm)) for name, tried in candidates.items()}
    pairs = _pairs(best, trials)
    trials = run(pairs, "trials", [TRIAL_SEED], *VALIDATION)
    best_pairs = sorted(pairs, key=lambda arm: gain(trials, arm), reverse=True)[:MAX_COMBINATIONS]
    best |= {name: control(name, entry, best[entry["like"]]) for name, entry in entries.items() if "like" in entry}
    shown = [*(best[name] for name in entries), *best_pairs]
    results = run(shown, "results", SEEDS)
    if status := measure_untrained(root, "defenses", [], overrides):
        raise SystemExit(status)
    needs = {name: entry.get("needs", "") for name, entry in entries.items()}
    # Other arms may have another aligned model.
    baselines = baseline_table(_rows_of(results, best["sft"]), read(out / UNTRAINED))
    controls = {name: entry["like"] for name, entry in entries.items() if "like" in entry}
    runs = stored_runs(results, ["arm"], read_verdicts(out, ["arm", "seed"]))
    compared = compare_arms(shown, runs, controls)
    tables = [format_defenses(shown, results, needs), baselines, comparison_table(compared, []) if compared else ""]
    fill(out / "README.md", "\n\n".join(filter(None, tables)))
    write_ranking([(_label(arm), _rows_of(results, arm)) for arm in shown], out / "plot.png")
    return 0


def gain(trials: Rows, arm: Arm) -> float:
    """Return accuracy minus harmful score minus over-refusal of the arm's trial, in percentage points."""
    (row,) = _rows_of(trials, arm)
    return float(row["accuracy"]) - float(row["harmful_score"]) - float(row["over_refusal"])


def _pairs(best: Mapping[str, Arm], trials: Rows) -> list[Arm]:
    """Return each of the two best choices of a stage combined with each of those of another stage."""
    best_of: dict[str, list[Arm]] = {}
    for stage in COMBINED:
        stage_arms = [arm for arm in best.values() if stage in arm.choices]
        by_choice: dict[str, Arm] = {}
        for arm in sorted(stage_arms, key=lambda arm: gain(trials, arm), reverse=True):
            by_choice.setdefault(arm.choices[stage], arm)
        best_of[stage] = list(by_choice.values())[:2]
    return [a | b for first, second in combinations(COMBINED, 2) for a in best_of[first] for b in best_of[second]]


def control(name: str, entry: Mapping[str, Any], defense: Arm) -> Arm:
    """Return the arm of a control.

    Args:
        name: name of the control.
        entry: its entry in defenses.yaml.
        defense: arm that it controls for. The control has its tuned values, and without `choose` its other settings.
    """
    inherited = {} if "choose" in entry else defense.fixed
    return Arm((name,), defense.tuned, entry.get("choose", defense.choices), {**inherited, **entry.get("set", {})})


def compare_arms(shown: Sequence[Arm], runs: Sequence[Run], controls: Mapping[str, str]) -> list[Comparison]:
    """Return the paired differences of each arm to SFT, and of a defense to its control.

    Args:
        shown: arms that are measured.
        runs: their runs.
        controls: control -> defense that it controls for.

    Returns:
        The comparisons that have verdicts on the same prompts.
    """
    groups = {_label(arm): SeedGroup((arm.name,), [r for r in runs if r.value("arm") == arm.name]) for arm in shown}
    pairs = [(name, "sft") for name in groups if name != "sft"]
    pairs += [(defense, control) for control, defense in controls.items() if {defense, control} <= {*groups}]
    comparisons = (compare_groups(groups[name], groups[base], name, base) for name, base in pairs if base in groups)
    return [comparison for comparison in comparisons if comparison.scores]


def _complete_table(root: Path, path: Path, needed: Sequence[Arm], seeds: Sequence[int], extra: Sequence[str]) -> Rows:
    """Run the arms that the table at `path` lacks, and return its rows.

    Raises:
        SystemExit: if a run failed. The table holds all others.
    """
    folder = root / "multirun" / "claims" / "defenses" / path.stem
    files = folder / "config" / "experiment" / "defenses"
    files.mkdir(parents=True, exist_ok=True)
    rows = read(path)
    for seed in seeds:
        measured = {row["arm"] for row in rows if row["seed"] == str(seed)}
        missing = [arm for arm in needed if arm.name not in measured]
        # Each run has a separate process, since memory that earlier runs left allocated would count.
        for arm in missing:
            arm.write(files)
            command = [
                *(sys.executable, "run.py", "-m", "--config-dir", str(folder / "config")),
                *(f"hydra.sweep.dir={folder / arm.name}", f"experiment=defenses/{arm.name}"),
                *(f"seed={seed}", "evaluate.every=0", *extra),
            ]
            status = subprocess.run(command, cwd=root, check=False).returncode
            runs = [run for run in read_runs([folder]) if run.status == "finished"]
            finished = [_row(run) for run in runs]
            rows = merge(path, finished, ["arm"])
            # Trials and results have different seeds, so that their verdicts share a file.
            write_verdicts(path.parent, runs, [{k: row[k] for k in ("arm", "seed")} for row in finished])
            if status:
                raise SystemExit(status)
    return rows


def _row(run: Run) -> dict[str, str]:
    """Return the line of a run: arm, seed, scores, and the cost of all training stages."""
    metrics = run.metrics
    return {
        "arm": run.choices["experiment"].removeprefix("defenses/"),
        "seed": run.value("seed"),
        **{name: f"{metrics[f'final/{name}']:.4g}" for name in SCORES},
        **{name: f"{metrics[name]:.4g}" for name in BASELINES if name in metrics},
        "seconds": f"{sum(metrics.get(f'time/{stage}_s', 0.0) for stage in TRAINED):.4g}",
        "gib": f"{max(metrics.get(f'memory/{stage}_mib', 0.0) for stage in TRAINED) / 1024:.4g}",
    }


def _rows_of(rows: Rows, arm: Arm) -> Rows:
    return [row for row in rows if row["arm"] == arm.name]


def _label(arm: Arm) -> str:
    return " + ".join(arm.defenses)


def format_defenses(shown: Sequence[Arm], rows: Rows, needs: Mapping[str, str]) -> str:
    """Return a Markdown table with one line per arm: setting, scores, cost, requirements.

    Args:
        shown: arms, in the order of the lines.
        rows: lines of results.csv.
        needs: defense -> its requirements, "" for none.
    """
    names = (*SCORES, "seconds", "gib")
    scores = ("harmful score", "refusal rate", "over-refusal", "accuracy")
    heads = ("defense", "setting", *scores, "time, s", "memory, GiB", "needs")
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in shown:
        setting = ", ".join(f"{key}={value:g}" for key, value in arm.tuned.items())
        requirements = "; ".join(filter(None, dict.fromkeys(needs[name] for name in arm.defenses)))
        cells = (_label(arm), setting, *(spread(_rows_of(rows, arm), name) for name in names), requirements)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nSeeds {', '.join(map(str, SEEDS))}: mean ± standard deviation, scores in percent."
