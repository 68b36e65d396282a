"""The runs of a sweep, read from their folders, in what they differ, and their scores over seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final, Literal

from lisa_lightning.config.validate import bookkeeping, flat
from lisa_lightning.logger.run_name import Identity, identity
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import read_json
from lisa_lightning.runtime.run_files import (
    CONFIG,
    FAILED,
    REPEAT,
    complete,
    read_choices,
    read_config,
    read_metrics,
    refuse_changed,
)

NO_RUN: Final = {".hydra", "wandb"}
"""Folders of a run that hold a config.yaml of their own."""
Status = Literal["finished", "unfinished", "failed"]
DEFENSES: Final = ("method", "curate", "align", "repair")
GROUPS: Final = (*DEFENSES, "model", "task", "source", "judge")
"""Config groups by which runs are told apart, before any single key."""
OF_CHOICE: Final = {
    "method": ("method",),
    "curate": ("curate",),
    "align.method": ("align",),
    "repair": ("repair",),
    "model": ("model",),
    "task": ("task",),
    "source": ("source", "task"),
    "judge": ("judge",),
    "lora.targets": ("model",),
    "align.lora.targets": ("model",),
}
"""What keys begin with that come from a choice's file -> the choices that they may follow from."""
MADE_BY: Final = {
    "inputs": "rows, base model or own classes",
    "judge_versions": "what a judge goes by",
}
"""Keys of metrics.json that say by what, beside its config, a run was made."""
SHOWN: Final = ("harmful_score", "refusal_rate", "over_refusal", "accuracy", "win_rate")


@dataclass(frozen=True)
class Run:
    """A run's folder, as far as it got."""

    folder: Path
    status: Status
    cause: str
    config: Mapping[str, Any]
    """Key with dots -> value; lists are values."""
    choices: Mapping[str, str]
    metrics: Mapping[str, Any]

    @cached_property
    def own(self) -> Identity:
        """What it is."""
        return identity(self.config, self.choices)

    def value(self, key: str) -> str:
        """What was chosen for a group or a key, as text; of a defense whose stage doesn't run there is nothing."""
        if key in DEFENSES:
            return self.own.defenses.get(key, "–" if key == "method" else "none")
        if key == "model":
            return self.own.model
        if key == "judge":
            return ",".join(self.judges) or "–"
        return self.choices.get(key, "?") if key in GROUPS else shown(self.config.get(key))

    @property
    def judges(self) -> list[str]:
        """Who judged its answers, the last asked first, or will; not the one by rule behind others, asked unasked."""
        asked = dict.fromkeys(key.split(".")[1] for key in self.config if key.startswith("judge."))
        found = list(self.metrics.get("judges", asked))
        return found[:-1] if len(found) > 1 and found[-1] == "refusal" else found

    def score(self, name: str) -> float | None:
        """A score of the fine-tuned model, or of the one that was asked as it is."""
        return self.metrics.get(f"{'final' if self.own.tuned else 'aligned'}/{name}")


@dataclass(frozen=True)
class Spread:
    """A score over the seeds of one setting."""

    mean: float
    deviation: float | None
    """The standard deviation; None of one run."""
    low: float
    high: float
    """The 95 % interval: Student's of the mean over seeds, or where they don't differ a run's own over answers."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ in nothing but the seed."""

    values: tuple[str, ...]
    runs: list[Run]

    def spread(self, name: str) -> Spread | None:
        """A score's mean over the runs that have it."""
        scored = [(run, x) for run in self.runs if (x := run.score(name)) is not None]
        found = [x for _, x in scored]
        if not found:
            return None
        ends = [[x if (y := r.score(f"{name}_{e}")) is None else y for e in ("low", "high")] for r, x in scored]
        deviation = stdev(found) if len(found) > 1 else None
        if not deviation:  # of one run, or of runs that agree by chance
            return Spread(found[0], deviation, min(low for low, _ in ends), max(high for _, high in ends))
        from scipy.stats import t

        mean = fmean(found)
        half = float(t.ppf(0.975, len(found) - 1)) * deviation / math.sqrt(len(found))
        return Spread(mean, deviation, max(0.0, mean - half), min(100.0, mean + half))


def shown(value: Any) -> str:
    """A config value as people write it; a step split as K1/K2."""
    if isinstance(value, list):
        return "/".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """All runs in and below the folders, in the order of their names.

    Raises:
        UserError: there are none.
    """
    names = ("config.yaml", FAILED)
    below = ((root, file) for root in map(Path.resolve, folders) for name in names for file in root.rglob(name))
    found = {file.parent for root, file in below if not NO_RUN & {*file.relative_to(root).parts}}
    if not found:
        raise UserError(f"{', '.join(map(str, folders))}: there is no run in it")
    return [_read(folder) for folder in sorted(found)]


def _read(folder: Path) -> Run:
    """Return the run in a folder. One whose files are damaged counts as failed: other runs have their page."""
    try:
        return _read_whole(folder)
    except UserError as error:
        return Run(folder, "failed", printable(str(error)), _config(folder / ".hydra", quietly=True), {}, {})


def _read_whole(folder: Path) -> Run:
    metrics, failed = read_metrics(folder), read_json(folder / FAILED, REPEAT)
    if complete(metrics):
        refuse_changed(folder)
    status: Status = "failed" if failed else "finished" if complete(metrics) else "unfinished"
    config = _config(folder) or _config(folder / ".hydra")
    choices = read_choices(folder) or _chosen(folder / ".hydra")
    return Run(folder, status, printable(str(failed.get("cause", ""))), config, choices, metrics)


def _chosen(folder: Path) -> dict[str, str]:
    """Return what Hydra wrote down of a run that was refused before it began."""
    start = "hydra.runtime.choices."
    return {k.removeprefix(start): str(v) for k, v in _config(folder, "hydra.yaml").items() if k.startswith(start)}


def _config(folder: Path, name: str = CONFIG, quietly: bool = False) -> dict[str, Any]:
    """Return a config by keys with dots, {} where there is none, or a broken one and `quietly` is set."""
    try:
        return dict(flat(read_config(folder, name) or {}))
    except UserError:
        if quietly:
            return {}
        raise


def swept(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """In what runs differ beside their seed: the method, then the groups and keys that tell them apart; and the rest.

    The rest follows from those before it, as K2 does from the split, or a learning rate that was another for each
    method. What follows from a choice by its file alone (`OF_CHOICE`) is in neither.
    """
    runs = [run for run in runs if run.status != "failed"] or runs  # a refused config may be half of one
    keys = sorted({k for run in runs for k in run.config}, key=lambda k: (k.count("."), k))
    found, rest = ["method"], []
    for key in [*GROUPS, *keys]:
        if key in found or bookkeeping(key) or key in ("seed", "experiment", "responses"):
            continue
        if key.endswith(".seed") and all(r.value(key) == r.value("seed") for r in runs if key in r.config):
            continue
        if _follows(runs, key, ()):
            continue
        if not _follows(runs, key, found):
            found.append(key)
        elif not any(f"{key}.".startswith(f"{part}.") and _follows(runs, key, of) for part, of in OF_CHOICE.items()):
            rest.append(key)
    return found, rest


def _follows(runs: Sequence[Run], key: str, known: Sequence[str]) -> bool:
    """Whether runs that are alike in `known` are alike in `key`."""
    seen = {(*(run.value(k) for k in known), run.value(key)) for run in runs}
    return len(seen) == len({values[:-1] for values in seen})


def seed_groups(runs: Sequence[Run], keys: Sequence[str]) -> list[SeedGroup]:
    """Finished runs by what they share, in the order of the values; of two runs with one seed the later counts."""
    found: dict[tuple[str, ...], dict[str, Run]] = {}
    for run in runs:
        if run.status == "finished":
            found.setdefault(tuple(run.value(k) for k in keys), {})[run.value("seed")] = run
    return [
        SeedGroup(values, list(found[values].values()))
        for values in sorted(found, key=lambda v: [in_order(x) for x in v])
    ]


def unlike(groups: Sequence[SeedGroup]) -> list[str]:
    """What differs, beside the config, among runs over which a mean is taken."""
    return [
        said
        for key, said in MADE_BY.items()
        if any(len({run.metrics.get(key) for run in group.runs}) > 1 for group in groups)
    ]


def in_order(value: str) -> tuple[float, str]:
    """Numbers by size, K1/K2 by K1, words by the alphabet behind them."""
    try:
        return float(value.partition("/")[0]), value
    except ValueError:
        return math.inf, value


def scores_shown(groups: Sequence[SeedGroup]) -> list[str]:
    """The scores that any run has."""
    return [name for name in SHOWN if any(g.spread(name) for g in groups)]


def cell(spread: Spread | None, form: Callable[[Spread], str]) -> str:
    """A spread in words, a dash where there is none."""
    return "–" if spread is None else form(spread)


def mean_and_deviation(spread: Spread) -> str:
    """71.1 ± 9.7, without a deviation where there is one run."""
    return f"{spread.mean:.1f}" + ("" if spread.deviation is None else f" ± {spread.deviation:.1f}")


def relative(folder: Path, out: Path) -> str:
    """A run's folder as seen from the page."""
    folder, out = folder.resolve(), out.resolve()
    return str(folder.relative_to(out)) if folder.is_relative_to(out) else str(folder)


def causes(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """What went wrong -> the runs in which it did."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.status == "failed":
            found.setdefault(run.cause, []).append(run)
    return found
