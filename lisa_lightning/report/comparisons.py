"""Paired differences between settings of a sweep on the same prompts. Start at `compare_settings`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lisa_lightning.report.run_verdicts import on_same_prompts
from lisa_lightning.report.score_table import format_points
from lisa_lightning.report.sweep_runs import SHOWN_SCORES, Run, SeedGroup

if TYPE_CHECKING:  # numpy is imported only where a comparison is computed
    from lisa_lightning.evaluation.paired import Difference

ABLATIONS: Final = {"lisa": ("bso", "proximal")}
"""Method -> the methods that omit one of its two parts."""


@dataclass(frozen=True)
class PairedScore:
    """Paired difference of a score, with McNemar's p-value if one run is compared with one other."""

    difference: "Difference"
    p: float | None

    def __str__(self) -> str:
        """Return difference, interval and p-value as text."""
        d = self.difference
        text = f"{format_points(d.value)} ({format_points(d.low)} to {format_points(d.high)})"
        return text if self.p is None else f"{text}, {format_p(self.p)}"


@dataclass(frozen=True)
class Comparison:
    """A setting compared with a baseline on the same prompts."""

    setting: str
    baseline: str
    runs: int
    """Number of pairs of runs."""
    scores: dict[str, PairedScore]
    """Name of a score -> its paired difference, setting minus baseline."""


def compare_settings(groups: Sequence[SeedGroup], keys: Sequence[str], first: Path | None = None) -> list[Comparison]:
    """Return the paired differences of each setting to SFT, and of a method to its ablations.

    Both have equal values of all keys outside the method. Runs with the same seed form a pair. If there are two runs
    only, they are compared whatever they differ in: the second with the first, or with SFT.

    Args:
        groups: finished runs by setting.
        keys: keys that distinguish the settings, the method first.
        first: folder of the first run if two folders are compared.

    Returns:
        The comparisons that have a score with verdicts on the same prompts.
    """
    comparisons = (
        compare_groups(group, baseline, _label(group, keys), _label(baseline, keys))
        for baseline, group in _baselines(groups, keys, first)
    )
    return [comparison for comparison in comparisons if comparison.scores]


def compare_groups(group: SeedGroup, baseline: SeedGroup, setting: str, baseline_setting: str) -> Comparison:
    """Return the paired differences between two settings.

    Args:
        group: runs of the setting.
        baseline: runs to compare with. Runs with the same seed form a pair, and so do two single runs.
        setting: name of the setting.
        baseline_setting: name of the baseline.
    """
    pairs = _paired_runs(baseline, group)
    paired = {name: _paired_score(pairs, name) for name in SHOWN_SCORES}
    scores = {name: score for name, score in paired.items() if score is not None}
    return Comparison(setting, baseline_setting, len(pairs), scores)


def compared_scores(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the names of the scores that any comparison has."""
    return [name for name in SHOWN_SCORES if any(name in c.scores for c in comparisons)]


def format_p(p: float) -> str:
    """Return a p-value as text."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}"


def _label(group: SeedGroup, keys: Sequence[str]) -> str:
    method, *values = group.values
    words = [f"{key} {value}" for key, value in zip(keys[1:], values, strict=True)]
    return ", ".join([method, *words] if method != "–" else words)


def _baselines(
    groups: Sequence[SeedGroup], keys: Sequence[str], first: Path | None
) -> Iterator[tuple[SeedGroup, SeedGroup]]:
    """Yield pairs of a baseline and a setting to compare with it."""
    if len(groups) == 2 and all(len(group.runs) == 1 for group in groups):
        yield _ordered(groups[0], groups[1], first)
        return
    shared = [index for index, key in enumerate(keys) if key.partition(".")[0] != "method"]
    for group in groups:
        for method in ("sft", *ABLATIONS.get(group.values[0], ())):
            matching = [
                g for g in groups if g.values[0] == method and all(g.values[i] == group.values[i] for i in shared)
            ]
            if len(matching) == 1 and group.values[0] != method:
                yield matching[0], group


def _ordered(one: SeedGroup, other: SeedGroup, first: Path | None) -> tuple[SeedGroup, SeedGroup]:
    """Return two settings with the baseline first."""
    if first is None:
        return (other, one) if other.values[0] == "sft" else (one, other)
    return (one, other) if one.runs[0].folder.is_relative_to(first.resolve()) else (other, one)


def _paired_runs(baseline: SeedGroup, group: SeedGroup) -> list[tuple[Run, Run]]:
    if len(baseline.runs) == len(group.runs) == 1:
        return [(baseline.runs[0], group.runs[0])]
    by_seed = {run.value("seed"): run for run in baseline.runs}
    return [(by_seed[run.value("seed")], run) for run in group.runs if run.value("seed") in by_seed]


def _paired_score(pairs: Sequence[tuple[Run, Run]], metric: str) -> PairedScore | None:
    """Return the paired difference of a score, None without verdicts of the same judge on the same prompts."""
    verdicts = [(before.verdicts(metric), after.verdicts(metric)) for before, after in pairs]
    judges = {score.judge for pair in pairs for run in pair if (score := run.score(metric)) is not None}
    before, after = ([v for pair in verdicts if (v := pair[i]) is not None] for i in (0, 1))
    if not pairs or len(before) < len(pairs) or len(after) < len(pairs) or len(judges) > 1:
        return None
    if not on_same_prompts([*before, *after]):
        return None
    from lisa_lightning.evaluation.paired import mcnemar_exact, paired_difference

    prompts = before[0].prompts
    difference = paired_difference([v.hits for v in before], [v.hits for v in after], prompts)
    return PairedScore(difference, mcnemar_exact(before[0].hits, after[0].hits, prompts) if len(pairs) == 1 else None)
