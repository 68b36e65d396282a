"""Rates of answers with 95 % confidence intervals. Start at `estimate_rate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from lisa_lightning.evaluation.scores import Score

RESAMPLES: Final = 10_000
Z: Final = 1.959963984540054
"""Quantile of the normal distribution for a 95 % interval."""


@dataclass(frozen=True)
class Rate:
    """Percentage of answers with its 95 % interval."""

    value: float
    low: float
    high: float
    answers: int
    """Number of answers."""

    def score(self, model: str, judge: str, metric: str, prompt_set: str = "") -> Score:
        """Return this rate as a score of a model, of one prompt set or ("") of all."""
        return Score(model, judge, metric, self.value, self.low, self.high, self.answers, prompt_set)


def estimate_rate(hits: Sequence[bool], prompts: Sequence[str]) -> Rate:
    """Return the percentage of hits with its 95 % interval.

    - If each answer has a different prompt, the interval is Wilson's (Wilson 1927, eq. 4).
    - Answers to the same prompt are correlated. A bootstrap then draws prompts with all their answers, 10,000 times;
      the interval is from the 2.5 % to the 97.5 % quantile.
    - If the rates of all prompts are equal, every sample would repeat them. The interval is Wilson's over the prompts.

    Args:
        hits: True for each answer that counts; not empty.
        prompts: the prompt of each answer.
    """
    values = np.asarray(hits, dtype=float)
    distinct, prompt_index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    sums, sizes = np.bincount(prompt_index, weights=values), np.bincount(prompt_index)
    if len(distinct) == len(values) or np.ptp(sums / sizes) == 0:
        low, high = wilson(values.mean(), len(distinct))
    else:
        rng = np.random.default_rng(0)
        samples = [rng.integers(len(distinct), size=len(distinct)) for _ in range(RESAMPLES)]
        low, high = np.quantile([sums[s].sum() / sizes[s].sum() for s in samples], (0.025, 0.975))
    # Rounding turns errors such as 9e-17 into zero.
    low, high = (round(100 * float(bound), 9) + 0.0 for bound in (low, high))
    return Rate(100 * float(values.mean()), low, high, len(values))


def wilson(p: float, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval for a rate `p` of `n` (Wilson 1927, eq. 4), from 0 to 1."""
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
