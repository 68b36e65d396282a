"""The section of a page on its searches: best value so far, worst case of an attacker, all trials.

Start at `search_section`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lisa_lightning.report.searches import Search, TrialRun, reported_score, unequal_searches
from lisa_lightning.report.svg import AMBER, BLUE, GREEN, ORANGE, SLATE, VIOLET, Axis, Figure, Line, Plot, draw_figure
from lisa_lightning.report.sweep_runs import Run, relative_path

if TYPE_CHECKING:
    from lisa_lightning.evaluation.rates import Rate

COLOURS: Final = (GREEN, ORANGE, BLUE, VIOLET, AMBER, SLATE)
DASHES: Final = ("-", "--", "-.", ":")
WORST_CASE: Final = (
    *("defense", "trials", "settings", "harmful score", "95 % interval", "at default", "95 % interval"),
    *("accuracy", "share of undefended"),
)
"""Columns of the best trials of attackers. Both scores are on the prompts that led no search."""
BEST: Final = ("defense", "trials", "settings", "value", "harmful score", "accuracy")
"""Columns of the best trials of other searches."""


@dataclass(frozen=True)
class TrialTable:
    """All trials of a search as text."""

    title: str
    keys: list[str]
    rows: list[tuple[str, str, list[str], list[str]]]
    """Number, folder of a finished run or "", values of the keys, and value, scores and status."""


@dataclass(frozen=True)
class SearchSection:
    """Content of the section."""

    notes: list[str]
    attacks: bool
    """True if an attacker's objective led the searches."""
    objective: str
    heads: Sequence[str]
    rows: list[list[str]]
    figures: list[Figure]
    tables: list[TrialTable]


def search_section(searches: Sequence[Search], out: Path) -> SearchSection | None:
    """Return the section on searches, None without any.

    Args:
        searches: searches of the page (`read_searches`).
        out: folder of the page, for its links to the runs.
    """
    if not searches:
        return None
    labels = search_labels(searches)
    attacks = all(search.objective.floor is not None for search in searches)
    return SearchSection(
        unequal_searches(searches),
        attacks,
        searches[0].objective.value,
        WORST_CASE if attacks else BEST,
        [_best_row(search, label, attacks) for search, label in zip(searches, labels, strict=True)],
        _figures(searches, labels, attacks),
        [_trial_table(search, label, out) for search, label in zip(searches, labels, strict=True)],
    )


def search_labels(searches: Sequence[Search]) -> list[str]:
    """Return the defense of each search, with the folder's name if several have the same defenses."""
    labels = [search.label for search in searches]
    return [
        label if labels.count(label) == 1 else f"{label} ({search.folder.name})"
        for search, label in zip(searches, labels, strict=True)
    ]


def search_lines(searches: Sequence[Search]) -> Iterator[str]:
    """Yield the notes and best trials as lines for a terminal."""
    yield from unequal_searches(searches)
    for search, label in zip(searches, search_labels(searches), strict=True):
        attacks = search.objective.floor is not None
        cells = _best_row(search, label, attacks)[1:]
        yield f"{label}: " + ", ".join(
            f"{h} {c}" for h, c in zip((WORST_CASE if attacks else BEST)[1:], cells, strict=True)
        )


def _best_row(search: Search, label: str, attacks: bool) -> list[str]:
    """Return the cells of the best trial: `WORST_CASE` for attackers, else `BEST`."""
    best = search.best
    run = None if best is None else best.run
    settings = "none counts" if best is None else _settings(search, run)
    start = [label, f"{len(search.finished)} of {search.planned}", settings]
    accuracy = _score(run, "accuracy")
    if not attacks:
        value = "–" if best is None else f"{best.trial.value:.2f}"
        return [*start, value, _score(run, "harmful_score"), accuracy]
    undefended = search.objective.undefended_accuracy
    score = None if run is None else run.score("accuracy")
    share = f"{100 * score.value / undefended:.1f} %" if score is not None and undefended else "–"
    return [*start, *_rate(reported_score(run)), *_rate(reported_score(search.default)), accuracy, share]


def _settings(search: Search, run: Run | None) -> str:
    return "–" if run is None else ", ".join(f"{key} {run.value(key)}" for key in search.keys) or "–"


def _rate(rate: "Rate | None") -> tuple[str, str]:
    """Return a rate and its interval as text."""
    return ("–", "–") if rate is None else (f"{rate.value:.1f}", f"{rate.low:.1f} to {rate.high:.1f}")


def _score(run: Run | None, metric: str) -> str:
    score = None if run is None else run.score(metric)
    return "–" if score is None else f"{score.value:.1f}"


def _figures(searches: Sequence[Search], labels: Sequence[str], attacks: bool) -> list[Figure]:
    """Return the plot of the best value so far with a line for each search, [] if no trial counts."""
    lines = []
    for i, (search, label) in enumerate(zip(searches, labels, strict=True)):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        values = [
            (t.trial.number + 1.0, t.trial.value) for t in search.trials if t.counts and t.trial.value is not None
        ]
        if values:
            lines += [
                Line(values, colour, dash="", marker=".", opacity=0.45),
                Line(search.best_so_far, colour, label, dash),
            ]
    if not lines:
        return []
    last = max(len(search.trials) for search in searches)
    caption = "Largest value of the objective among the trials until then. Points are single trials."
    unit = "percent, prompts of the search" if attacks else searches[0].objective.value
    title = "Harmful score that the search has reached" if attacks else "Value that the search has reached"
    axis = Axis("trial", 0.5, last + 0.5, integer=True)
    return [draw_figure(Plot("search", title, caption, unit, lines, axis, percent=attacks))]


def _trial_table(search: Search, label: str, out: Path) -> TrialTable:
    keys = search.keys
    rows = [
        (
            str(trial.trial.number + 1),
            relative_path(trial.run.folder, out) if trial.run is not None and trial.run.status == "finished" else "",
            ["–" if trial.run is None else trial.run.value(key) for key in keys],
            _trial_cells(trial),
        )
        for trial in search.trials
    ]
    return TrialTable(label, keys, rows)


def _trial_cells(trial: TrialRun) -> list[str]:
    """Return value, scores on all prompts, and status of a trial as text."""
    value = trial.trial.value
    status = "failed" if value is None else "counts" if trial.counts else "too inaccurate"
    return [
        "–" if value is None else f"{value:.2f}",
        _score(trial.run, "harmful_score"),
        _score(trial.run, "accuracy"),
        status,
    ]
