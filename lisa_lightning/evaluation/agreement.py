"""Agreement of judges on the same answers, as Cohen's kappa. Start at `judge_agreements`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from lisa_lightning.evaluation.scores import Metrics

if TYPE_CHECKING:
    # Reports read agreements without torch and numpy, which take long to import.
    from lisa_lightning.evaluation.judging import Judged

PREFIX: Final = "agreement"
"""First part of the metrics' names."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two judges on whether answers to harmful requests are harmful."""

    first: str
    second: str
    equal: float
    """Share of equal verdicts, in percent."""
    answers: int
    """Number of answers that both judged."""
    kappa: float | None = None
    """Cohen's kappa; None if a judge gave all answers the same verdict, since kappa is then 0 or undefined."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval of kappa; None if the judges never differ, which leaves no spread to resample."""

    @property
    def entries(self) -> Metrics:
        """The entries in metrics.json."""
        name = f"{PREFIX}/{self.first}/{self.second}"
        metrics: Metrics = {f"{name}/equal": self.equal, f"{name}/answers": self.answers}
        if self.kappa is not None:
            metrics |= {f"{name}/kappa": self.kappa}
        if self.low is not None:
            metrics |= {f"{name}/kappa_low": self.low, f"{name}/kappa_high": self.high}
        return metrics


def judge_agreements(judged: Sequence["Judged"]) -> list[Agreement]:
    """Return the agreement of every two judges of the harmful score, over the answers of all models.

    Args:
        judged: verdicts of all judges. Only those on harmful requests count.
    """
    by_judge: dict[str, dict[tuple[str, int], Judged]] = {}
    for line in judged:
        if (line.metric, line.kind) == ("harmful_score", "harmful"):
            by_judge.setdefault(line.judge, {})[line.model, line.index] = line
    agreements = []
    for (first, verdicts), (second, others) in combinations(by_judge.items(), 2):
        if shared := [answer for answer in verdicts if answer in others]:
            lines = [verdicts[answer] for answer in shared]
            flags = [others[answer].flagged for answer in shared]
            agreements.append(
                _agreement(first, second, [v.flagged for v in lines], flags, [line.prompt for line in lines])
            )
    return agreements


def _agreement(
    first: str, second: str, flags: Sequence[bool], others: Sequence[bool], prompts: Sequence[str]
) -> Agreement:
    """Return the agreement of two judges, with the percentile interval of a bootstrap over prompts."""
    import numpy as np

    from lisa_lightning.evaluation.rates import RESAMPLES

    a, b = np.asarray(flags, dtype=bool), np.asarray(others, dtype=bool)
    _, index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    # Answers of each prompt: flagged by both, by the first alone, by the second alone, by none.
    table = np.stack([np.bincount(index, weights=cell) for cell in (a & b, a & ~b, ~a & b, ~a & ~b)], axis=1)
    equal, answers = 100 * float((a == b).mean()), len(flags)
    if a.all() or b.all() or not a.any() or not b.any():
        return Agreement(first, second, equal, answers)
    kappa = float(cohen_kappa(table.sum(axis=0)))
    if (a == b).all():
        return Agreement(first, second, equal, answers, kappa)
    rng = np.random.default_rng(0)
    resampled = [table[rng.integers(len(table), size=len(table))].sum(axis=0) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(cohen_kappa(np.stack(resampled)), (0.025, 0.975))
    return Agreement(first, second, equal, answers, kappa, float(low), float(high))


def cohen_kappa(counts: Any) -> Any:
    """Return Cohen's kappa of two judges (Cohen 1960), NaN if chance alone explains full agreement.

        kappa = (p_o - p_e) / (1 - p_e)

    with the share p_o of equal verdicts, and the share p_e that is expected if the judges were independent.

    Args:
        counts: answers that both flag, the first alone, the second alone and none of them, along the last axis.
    """
    import numpy as np

    both, first, second, none = np.moveaxis(np.asarray(counts, dtype=float), -1, 0)
    total = both + first + second + none
    observed = (both + none) / total
    expected = ((both + first) * (both + second) + (none + first) * (none + second)) / total**2
    with np.errstate(invalid="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)


def read_agreements(metrics: Mapping[str, Any]) -> list[Agreement]:
    """Return the agreements in metrics.json, in its order.

    Args:
        metrics: content of metrics.json.
    """
    agreements = []
    for name, equal in metrics.items():
        prefix, *parts = name.split("/")
        if prefix == PREFIX and len(parts) == 3 and parts[2] == "equal":
            pair = f"{PREFIX}/{parts[0]}/{parts[1]}"
            values = (metrics.get(f"{pair}/kappa{end}") for end in ("", "_low", "_high"))
            agreements.append(Agreement(parts[0], parts[1], equal, metrics.get(f"{pair}/answers", 0), *values))
    return agreements
