"""Searches of a page: trials, the best value so far, and the worst case of an attacker. Start at `read_searches`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_lightning.report.run_verdicts import split_prompts
from lisa_lightning.report.search_trials import (
    DEFAULT,
    Objective,
    Trial,
    read_trials,
    search_folders,
)
from lisa_lightning.report.sweep_runs import Run, swept_keys

if TYPE_CHECKING:  # numpy is imported only where a page has a search
    from lisa_lightning.evaluation.rates import Rate


@dataclass(frozen=True)
class TrialRun:
    """A trial with its run."""

    trial: Trial
    run: Run | None
    """None if its folder was deleted."""

    @property
    def counts(self) -> bool:
        """True if the trial has a value, and keeps the accuracy that an attacker needs."""
        value = self.trial.value
        return value is not None and (self.trial.objective.floor is None or value >= 0)


@dataclass(frozen=True)
class Search:
    """The trials of one search, by number."""

    folder: Path
    objective: Objective
    planned: int
    trials: list[TrialRun]
    default: Run | None
    """Run of the defense at its default setting, which only an attacker's search has."""

    @property
    def finished(self) -> list[TrialRun]:
        """Trials that have a value."""
        return [trial for trial in self.trials if trial.trial.value is not None]

    @property
    def runs(self) -> list[Run]:
        """The run of each trial, each once."""
        by_folder = {t.run.folder: t.run for t in self.trials if t.run is not None}
        return list(by_folder.values())

    @property
    def keys(self) -> list[str]:
        """Keys in which the trials differ."""
        runs = self.runs
        keys, dependent = swept_keys(runs) if runs else ([], [])
        return [key for key in [*keys, *dependent] if len({run.value(key) for run in runs}) > 1]

    @property
    def best(self) -> TrialRun | None:
        """The first trial with the largest value among those that count, None without any."""
        counting = [trial for trial in self.trials if trial.counts]
        return max(counting, key=_value, default=None)

    @property
    def best_so_far(self) -> list[tuple[float, float]]:
        """Number of each trial from 1, and the largest value until then. It begins with the first trial that counts."""
        points: list[tuple[float, float]] = []
        for trial in self.trials:
            values = [point[1] for point in points[-1:]] + ([_value(trial)] if trial.counts else [])
            if values:
                points.append((trial.trial.number + 1.0, max(values)))
        return points

    @property
    def label(self) -> str:
        """The defense, such as `lisa` or `vaccine + lisa`."""
        run = next(iter(self.runs), None)
        return self.folder.name if run is None else " + ".join(run.run_name.parts)


def read_searches(folders: Sequence[Path], runs: Sequence[Run]) -> list[Search]:
    """Return the searches in and below the folders.

    Args:
        folders: folders of sweeps, or any folders above them.
        runs: runs in and below the folders (`read_runs`).

    Raises:
        UserError: if a record of a trial is damaged.
    """
    by_folder = {run.folder.resolve(): run for run in runs}
    searches = []
    for folder in search_folders([*folders]):
        trials = read_trials(folder)
        first = trials[0]
        # Others are left of a search with another objective.
        trials = [trial for trial in trials if trial.objective.value == first.objective.value]
        members = [TrialRun(trial, by_folder.get((folder / trial.job).resolve())) for trial in trials]
        # A failed first trial may not have measured the undefended accuracy.
        objective = next((t.objective for t in trials if t.objective.floor is not None), first.objective)
        searches.append(
            Search(folder, objective, max(t.planned for t in trials), members, by_folder.get(folder / DEFAULT))
        )
    return searches


def reported_score(run: Run | None) -> "Rate | None":
    """Return the harmful score of a run on the half of the prompts that led no search, None without its verdicts."""
    verdicts = None if run is None else run.verdicts("harmful_score")
    half = None if verdicts is None else split_prompts(verdicts)[1]
    if half is None or not half.hits:
        return None
    from lisa_lightning.evaluation.rates import estimate_rate

    return estimate_rate(half.hits, half.prompts)


def unequal_searches(searches: Sequence[Search]) -> list[str]:
    """Return in sentences why searches of a page can't be compared, [] if they can."""
    problems = []
    if len({len(search.finished) for search in searches}) > 1:
        counts = ", ".join(f"{search.label} {len(search.finished)}" for search in searches)
        problems.append(
            f"The searches have unequal numbers of finished trials ({counts}). A larger budget finds a worse case."
        )
    problems += [
        f"{search.label}: {len(search.finished)} of {search.planned} trials are finished."
        for search in searches
        if len(search.finished) < search.planned
    ]
    if len({search.objective for search in searches}) > 1:
        problems.append("The searches have different objectives or undefended accuracies.")
    return problems


def _value(trial: TrialRun) -> float:
    assert trial.trial.value is not None
    return trial.trial.value
