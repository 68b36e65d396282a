"""Statistics of verdicts on the same prompts: two models compared, and intervals over seeds and prompts.

Start at `paired_difference` and `mcnemar_exact` for two models, and at `seed_and_prompt_interval` for one setting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_lightning.evaluation.rates import RESAMPLES, Rate, Z, estimate_rate, wilson

CHUNK: Final = 4_000_000
"""Maximum number of prompts that are drawn at once."""


class Interval(NamedTuple):
    """Ends of a 95 % interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Difference between the rates of two models on the same prompts, in percentage points, with its 95 % interval."""

    value: float
    """Rate of the second model minus that of the first."""
    low: float
    high: float
    prompts: int
    """Number of distinct prompts."""


def mcnemar_exact(before: Sequence[bool], after: Sequence[bool], prompts: Sequence[str]) -> float:
    """Return the two-sided p-value of McNemar's exact test (McNemar 1947) for two models.

    Without a difference between the models, each prompt is as likely to favour one as the other. The p-value is the
    probability that random signs of the prompts' differences give a sum at least as far from zero. If each answer has a
    different prompt, this is the binomial test of the prompts on which the models differ. Answers to a repeated prompt
    share one sign, since they are correlated.

    Args:
        before: True for each answer of the first model that counts.
        after: the same for the second model, in the same order.
        prompts: the prompt of each answer.
    """
    differences = np.asarray(after, dtype=int) - np.asarray(before, dtype=int)
    _, index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    sizes = np.abs(np.rint(np.bincount(index, weights=differences)).astype(int))
    total = int(sizes.sum())
    # Entry s is the probability of the sum s - total.
    probabilities = np.zeros(2 * total + 1)
    probabilities[total] = 1.0
    for size in sizes[sizes > 0]:
        probabilities = (np.roll(probabilities, size) + np.roll(probabilities, -size)) / 2
    sums = np.abs(np.arange(-total, total + 1))
    return min(1.0, float(probabilities[sums >= abs(int(differences.sum()))].sum()))


def paired_difference(before: ArrayLike, after: ArrayLike, prompts: Sequence[str]) -> Difference:
    """Return the difference between two models, or between two settings over the same seeds, with its 95 % interval.

    If each answer has a different prompt and there is one seed, the interval is that of Bonett and Price (2012) for
    paired proportions. Repeated prompts and seeds widen it as `seed_and_prompt_interval` describes.

    Args:
        before: True for each answer of the first model that counts; a row for each seed if there are several.
        after: the same for the second model, with the same seeds and prompts in the same order.
        prompts: the prompt of each answer.
    """
    first, second = _by_seed(before), _by_seed(after)
    differences = second - first
    count = len(set(prompts))
    # Rates of answers on which only one of the models counts.
    over_prompts = _bonett_price(float((differences < 0).mean()), float((differences > 0).mean()), count)
    intervals = [over_prompts]
    if len(differences) > 1 or count < len(prompts):
        intervals = _resampled_intervals(differences, prompts, over_prompts)
    low, high = _percent(intervals, -1.0)
    return Difference(100 * float(differences.mean()), low, high, count)


def seed_and_prompt_interval(hits: ArrayLike, prompts: Sequence[str]) -> Rate:
    """Return the percentage of hits over seeds and prompts with its 95 % interval.

    Seeds answer the same prompts, so that further seeds replace no prompts. The interval contains two others:

    - the bootstrap interval, for which seeds and prompts are drawn together, 10,000 times (Owen 2007)
    - the sum in quadrature of Wilson's interval over the distinct prompts and Student's t interval over seeds, since a
      bootstrap over few seeds is too narrow

    One seed has the interval of `estimate_rate`.

    Args:
        hits: True for each answer that counts, a row for each seed.
        prompts: the prompt of each answer of a seed.
    """
    values = _by_seed(hits)
    if len(values) == 1:
        return estimate_rate([bool(hit) for hit in values[0]], prompts)
    mean = float(values.mean())
    over_prompts = Interval(*wilson(mean, len(set(prompts))))
    low, high = _percent(_resampled_intervals(values, prompts, over_prompts), 0.0)
    return Rate(100 * mean, low, high, values.size)


def _by_seed(hits: ArrayLike) -> NDArray[np.float64]:
    """Return hits as numbers with a row for each seed."""
    return np.atleast_2d(np.asarray(hits, dtype=np.float64))


def _percent(intervals: Sequence[Interval], least: float) -> Interval:
    """Return the smallest interval that contains all intervals, in percent, within `least` to 1."""
    low, high = max(least, min(i.low for i in intervals)), min(1.0, max(i.high for i in intervals))
    # Rounding turns errors such as 9e-17 into zero.
    return Interval(round(100 * low, 9) + 0.0, round(100 * high, 9) + 0.0)


def _bonett_price(lost: float, gained: float, count: int) -> Interval:
    """Return the adjusted Wald interval of gained - lost for paired proportions (Bonett and Price 2012, eq. 9)."""
    lost, gained = ((rate * count + 1) / (count + 2) for rate in (lost, gained))
    middle = gained - lost
    half = Z * math.sqrt((gained + lost - middle**2) / (count + 2))
    return Interval(middle - half, middle + half)


def _resampled_intervals(values: NDArray[np.float64], prompts: Sequence[str], over_prompts: Interval) -> list[Interval]:
    """Return the bootstrap interval over seeds and prompts, and `over_prompts` with the spread over seeds added."""
    if len(values) > 1:
        over_prompts = add_seed_spread(over_prompts, values.mean(axis=1).tolist())
    return [_two_way_bootstrap(values, prompts), over_prompts]


def add_seed_spread(over_prompts: Interval, means: Sequence[float]) -> Interval:
    """Return an interval over prompts, widened by Student's t interval over seeds.

    The errors of prompts and seeds are independent, so that the distances of both ends from the mean add in quadrature
    (the square-and-add rule of Newcombe 1998).

    Args:
        over_prompts: interval of the mean over prompts.
        means: mean of each of at least two seeds.
    """
    mean, student = float(np.mean(means)), student_interval(means)
    return Interval(
        mean - math.hypot(mean - over_prompts.low, mean - student.low),
        mean + math.hypot(mean - over_prompts.high, mean - student.high),
    )


def student_interval(means: Sequence[float]) -> Interval:
    """Return Student's t interval of the mean of at least two values."""
    from scipy.stats import t

    array = np.asarray(means)
    half = float(t.ppf(0.975, len(array) - 1)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Interval(float(array.mean()) - half, float(array.mean()) + half)


def _two_way_bootstrap(values: NDArray[np.float64], prompts: Sequence[str]) -> Interval:
    distinct, index = np.unique(np.asarray(prompts, dtype=str), return_inverse=True)
    count, seeds = len(distinct), len(values)
    sizes = np.bincount(index).astype(float)
    sums = np.stack([np.bincount(index, weights=row) for row in values])
    rng = np.random.default_rng(0)
    means = []
    chunk = max(1, min(RESAMPLES, CHUNK // count))
    for start in range(0, RESAMPLES, chunk):
        draws = min(chunk, RESAMPLES - start)
        offsets = count * np.arange(draws)[:, None]
        drawn = rng.integers(count, size=(draws, count)) + offsets
        weights = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
        by_seed = np.take_along_axis(weights @ sums.T, rng.integers(seeds, size=(draws, seeds)), axis=1)
        means.append(by_seed.mean(axis=1) / (weights @ sizes))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(low), float(high))
