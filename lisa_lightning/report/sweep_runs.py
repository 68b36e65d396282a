"""Runs of a sweep and their statistics over seeds.

Start at `read_runs`, then `swept_keys` (the keys in which the runs differ) and `seed_groups`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, Literal

from lisa_lightning.config.same_run import is_bookkeeping
from lisa_lightning.config.validate import flat
from lisa_lightning.evaluation.scores import Score, find_score, read_scores
from lisa_lightning.evaluation.utility import UtilityScore, find_utility, read_utility
from lisa_lightning.logger.run_name import RunName, build_run_name
from lisa_lightning.report.run_verdicts import VerdictKey, Verdicts, on_same_prompts, read_verdicts
from lisa_lightning.report.score_table import utility_names
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import read_json
from lisa_lightning.runtime.run_files import (
    CONFIG,
    FAILED,
    REPEAT_FIX,
    is_complete,
    read_choices,
    read_config,
    read_metrics,
    refuse_changed,
)

SKIPPED_FOLDERS: Final = {".hydra", "wandb"}
"""Folders inside a run whose config.yaml is not a run's."""
Status = Literal["finished", "unfinished", "failed"]
DEFENSES: Final = ("method", "curate", "align", "repair")
GROUPS: Final = (*DEFENSES, "attack", "filter", "model", "task", "source", "engine", "judge")
"""Config groups that distinguish runs, before any single key does."""
GROUPS_BY_PREFIX: Final = {
    "method": ("method",),
    "curate": ("curate",),
    "align.method": ("align",),
    "repair": ("repair",),
    "attack": ("attack",),
    "filter": ("filter",),
    "model": ("model",),
    "task": ("task",),
    "source": ("source", "task"),
    "engine": ("engine",),
    "judge": ("judge",),
    "lora.targets": ("model",),
    "align.lora.targets": ("model",),
}
"""Prefix of keys that the files of config groups set -> those groups."""
HASHED_INPUTS: Final = {
    "inputs": "rows, base model or custom classes",
    "judge_versions": "versions of the judges",
}
"""Key of metrics.json -> the inputs of a run whose hash it holds."""
ROUNDING: Final = 0.01
"""Maximum difference between a score and that of its verdicts, in percentage points. Some files round to 4 digits."""
SHOWN_SCORES: Final = ("harmful_score", "refusal_rate", "over_refusal", "accuracy", "win_rate")


@dataclass(frozen=True)
class Run:
    """A run's folder, finished or not."""

    folder: Path
    status: Status
    cause: str
    """Error message of a failed run."""
    config: Mapping[str, Any]
    """Key with dots -> value; lists are values."""
    choices: Mapping[str, str]
    metrics: Mapping[str, Any]
    all_verdicts: Mapping[VerdictKey, Verdicts] = field(default_factory=dict)
    """Verdicts by prompt; {} if they are not stored."""

    @cached_property
    def run_name(self) -> RunName:
        """Defenses, model and task of the run."""
        return build_run_name(self.config, self.choices)

    def value(self, key: str) -> str:
        """Return the value of a config group or key as text; "none" for a defense whose stage does not run."""
        if key in DEFENSES:
            return self.run_name.defenses.get(key, "–" if key == "method" else "none")
        if key in ("attack", "filter"):
            # Runs of earlier versions had no choice.
            return getattr(self.run_name, key) or "none"
        if key == "model":
            return self.run_name.model
        if key == "judge":
            return ",".join(self.judges) or "–"
        if key == "engine":
            # Runs of earlier versions had no choice.
            return self.choices.get(key, "transformers")
        return self.choices.get(key, "?") if key in GROUPS else format_value(self.config.get(key))

    @property
    def judges(self) -> list[str]:
        """Names of the judges, most recent first, without the refusal judge that is added automatically."""
        configured = dict.fromkeys(key.split(".")[1] for key in self.config if key.startswith("judge."))
        names = list(self.metrics.get("judges", configured))
        # It never precedes the judges of the same judging.
        return [name for name in names if name != "refusal" or name in configured or name == names[0]]

    @cached_property
    def scores(self) -> list[Score]:
        """Scores of all models, in the order of their judges."""
        return read_scores(self.metrics)

    def score(self, metric: str) -> Score | None:
        """Return the first judge's score of the fine-tuned or repaired model, or of the only model of other runs.

        Returns:
            None if the score was not measured.
        """
        return find_score(self.scores, self.measured_model, metric)

    @cached_property
    def utility(self) -> list[UtilityScore]:
        """General utility of the same model as in `score`."""
        return [score for score in read_utility(self.metrics) if score.model == self.measured_model]

    @property
    def measured_model(self) -> str:
        """The fine-tuned or repaired model, or the only model of a run without either."""
        return "final" if self.run_name.evaluates_final else "aligned"

    def verdicts(self, metric: str, model: str | None = None) -> Verdicts | None:
        """Return the verdicts that a score counts over, None if they are not stored or belong to another judging.

        Args:
            metric: name of the score.
            model: name of the model; None: that of `score`.
        """
        score = find_score(self.scores, model or self.measured_model, metric)
        verdicts = None if score is None else self.all_verdicts.get((score.judge, score.model, metric))
        if score is None or verdicts is None:
            return None
        return verdicts if abs(100 * fmean(verdicts.hits) - score.value) <= ROUNDING else None


@dataclass(frozen=True)
class Spread:
    """Statistics of a score over the seeds of one setting, in percent."""

    mean: float
    deviation: float | None
    """Standard deviation, None for a single run."""
    low: float
    high: float
    """Ends of the 95 % interval over seeds and prompts (`SeedGroup.spread`)."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but the seed."""

    values: tuple[str, ...]
    """Values of the swept keys."""
    runs: list[Run]

    @cached_property
    def spreads(self) -> dict[str, Spread]:
        """Statistics of every score that a run has."""
        return {name: spread for name in SHOWN_SCORES if (spread := self._spread(name)) is not None}

    def spread(self, metric: str) -> Spread | None:
        """Return the statistics of a score over the runs that have it, None if no run has it.

        The interval of several runs is that of `seed_and_prompt_interval` if their verdicts are on the same prompts.
        Otherwise it is the mean of the runs' own intervals, widened by the spread over seeds (`add_seed_spread`).
        """
        return self.spreads.get(metric)

    def mean_utility(self, name: tuple[str, str]) -> str:
        """Return mean and standard deviation of a task's metric over the seeds as text, a dash without a value.

        Args:
            name: task and metric.
        """
        scores = [find_utility(run.utility, run.measured_model, name) for run in self.runs]
        values = [score.value for score in scores if score is not None]
        if not values:
            return "–"
        return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")

    def _spread(self, metric: str) -> Spread | None:
        runs = [run for run in self.runs if run.score(metric) is not None]
        scores = [score for run in runs if (score := run.score(metric)) is not None]
        if not scores:
            return None
        values = [score.value for score in scores]
        lows = [score.value if score.low is None else score.low for score in scores]
        highs = [score.value if score.high is None else score.high for score in scores]
        mean, low, high = fmean(values), fmean(lows), fmean(highs)
        if len(values) == 1:
            return Spread(mean, None, low, high)
        # These need numpy, which a run that shows no sweep does not import.
        from lisa_lightning.evaluation.paired import Interval, add_seed_spread, seed_and_prompt_interval

        verdicts = [v for run in runs if (v := run.verdicts(metric)) is not None]
        if len(verdicts) == len(runs) and on_same_prompts(verdicts):
            rate = seed_and_prompt_interval([v.hits for v in verdicts], verdicts[0].prompts)
            return Spread(mean, stdev(values), rate.low, rate.high)
        low, high = add_seed_spread(Interval(low, high), values)
        return Spread(mean, stdev(values), max(0.0, low), min(100.0, high))


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return all runs in and below the folders, sorted by path.

    Raises:
        UserError: if the folders hold no run.
    """
    names = ("config.yaml", FAILED)
    below = ((root, file) for root in map(Path.resolve, folders) for name in names for file in root.rglob(name))
    run_folders = {file.parent for root, file in below if not SKIPPED_FOLDERS & {*file.relative_to(root).parts}}
    if not run_folders:
        raise UserError(f"{', '.join(map(str, folders))}: no run found. Fix: name the folder of a sweep or of a run")
    return [_read(folder) for folder in sorted(run_folders)]


def _read(folder: Path) -> Run:
    """Return the run in a folder. With damaged files it counts as failed, so that other runs are still reported."""
    try:
        return _read_intact(folder)
    except UserError as error:
        return Run(folder, "failed", printable(str(error)), _config(folder / ".hydra", allow_broken=True), {}, {})


def _read_intact(folder: Path) -> Run:
    metrics, failed = read_metrics(folder), read_json(folder / FAILED, REPEAT_FIX)
    if is_complete(metrics):
        refuse_changed(folder)
    status: Status = "failed" if failed else "finished" if is_complete(metrics) else "unfinished"
    config = _config(folder) or _config(folder / ".hydra")
    choices = read_choices(folder) or _hydra_choices(folder / ".hydra")
    verdicts = read_verdicts(folder) if status == "finished" else {}
    return Run(folder, status, printable(str(failed.get("cause", ""))), config, choices, metrics, verdicts)


def _hydra_choices(folder: Path) -> dict[str, str]:
    """Return the choices in Hydra's files, for a run that was refused before it began."""
    prefix = "hydra.runtime.choices."
    return {k.removeprefix(prefix): str(v) for k, v in _config(folder, "hydra.yaml").items() if k.startswith(prefix)}


def _config(folder: Path, name: str = CONFIG, allow_broken: bool = False) -> dict[str, Any]:
    """Return a config as dotted key -> value; {} if the file is absent, or broken and `allow_broken` is set."""
    try:
        return dict(flat(read_config(folder, name) or {}))
    except UserError:
        if allow_broken:
            return {}
        raise


def swept_keys(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Return the keys in which runs differ, except the seed.

    Keys that a choice sets by its file alone (`GROUPS_BY_PREFIX`) are in neither list.

    Returns:
        The keys that distinguish the runs (`method`, then groups and single keys), and the keys that vary together with
        those: K2 with the split, or a learning rate that was set per method.
    """
    runs = [run for run in runs if run.status != "failed"] or runs  # a refused config may be incomplete
    config_keys = sorted({k for run in runs for k in run.config}, key=lambda k: (k.count("."), k))
    keys, dependent = ["method"], []
    for key in [*GROUPS, *config_keys]:
        if key in keys or is_bookkeeping(key) or key in ("seed", "experiment", "responses"):
            continue
        if key.endswith(".seed") and all(r.value(key) == r.value("seed") for r in runs if key in r.config):
            continue
        if _is_determined(runs, key, ()):
            continue
        if not _is_determined(runs, key, keys):
            keys.append(key)
        elif not any(
            f"{key}.".startswith(f"{prefix}.") and _is_determined(runs, key, groups)
            for prefix, groups in GROUPS_BY_PREFIX.items()
        ):
            dependent.append(key)
    return keys, dependent


def _is_determined(runs: Sequence[Run], key: str, by: Sequence[str]) -> bool:
    """Return whether runs with equal values of all keys in `by` have equal values of `key`."""
    seen = {(*(run.value(k) for k in by), run.value(key)) for run in runs}
    return len(seen) == len({values[:-1] for values in seen})


def seed_groups(runs: Sequence[Run], keys: Sequence[str]) -> list[SeedGroup]:
    """Return the finished runs, grouped by their values of `keys` and sorted by them.

    If two runs have the same seed, the later one counts.
    """
    by_values: dict[tuple[str, ...], dict[str, Run]] = {}
    for run in runs:
        if run.status == "finished":
            by_values.setdefault(tuple(run.value(k) for k in keys), {})[run.value("seed")] = run
    return [
        SeedGroup(values, list(by_values[values].values()))
        for values in sorted(by_values, key=lambda v: [sort_key(x) for x in v])
    ]


def sort_key(value: str) -> tuple[float, str]:
    """Return the sort key of a config value: numbers by size, K1/K2 by K1, then words in alphabetical order."""
    try:
        return float(value.partition("/")[0]), value
    except ValueError:
        return math.inf, value


def inconsistent_inputs(groups: Sequence[SeedGroup]) -> list[str]:
    """Return the inputs outside the config in which runs of a group differ, [] if every mean is over like runs."""
    return [
        description
        for key, description in HASHED_INPUTS.items()
        if any(len({run.metrics.get(key) for run in group.runs}) > 1 for group in groups)
    ]


def failures(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return cause -> the runs that failed with it."""
    by_cause: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "failed":
            by_cause.setdefault(run.cause, []).append(run)
    return by_cause


def measured_scores(groups: Sequence[SeedGroup]) -> list[str]:
    """Return the names of the scores that any run has."""
    return [name for name in SHOWN_SCORES if any(g.spread(name) for g in groups)]


def measured_utility(groups: Sequence[SeedGroup]) -> list[tuple[str, str]]:
    """Return task and metric of every score of general utility that any run has."""
    return utility_names([score for group in groups for run in group.runs for score in run.utility])


def format_value(value: Any) -> str:
    """Return a config value as text: a list as `K1/K2`, None as `null`."""
    if isinstance(value, list):
        return "/".join(map(format_value, value))
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def format_spread(spread: Spread | None, formatter: Callable[[Spread], str]) -> str:
    """Return `formatter(spread)`, a dash for None."""
    return "–" if spread is None else formatter(spread)


def mean_and_deviation(spread: Spread) -> str:
    """Return `71.1 ± 9.7`, or `71.1` for a single run."""
    return f"{spread.mean:.1f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.1f}")


def relative_path(folder: Path, out: Path) -> str:
    """Return a run's folder relative to the folder of the page, absolute if it is outside."""
    folder, out = folder.resolve(), out.resolve()
    return str(folder.relative_to(out)) if folder.is_relative_to(out) else str(folder)
