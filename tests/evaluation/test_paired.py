"""Statistics of verdicts on the same prompts: McNemar's test, paired differences, intervals over seeds and prompts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lisa_lightning.evaluation.paired import (
    mcnemar_exact,
    paired_difference,
    seed_and_prompt_interval,
    student_interval,
)
from lisa_lightning.evaluation.rates import estimate_rate

PAIRS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 9)), min_size=1, max_size=40)


def numbered(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def nested(counts: list[int], prompts: int = 150) -> np.ndarray:
    """Hits on the first prompts, a row for each seed."""
    return np.array([[i < count for i in range(prompts)] for count in counts])


@given(PAIRS)
def test_the_p_value_is_the_binomial_test_of_the_prompts_that_differ(pairs: list[tuple[bool, bool, int]]) -> None:
    before, after = [b for b, _, _ in pairs], [a for _, a, _ in pairs]
    gained, lost = sum(a > b for b, a, _ in pairs), sum(b > a for b, a, _ in pairs)
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar_exact(before, after, numbered(len(pairs))) == pytest.approx(expected, rel=1e-9)


@given(PAIRS, st.integers(2, 4))
def test_repeated_answers_add_no_evidence(pairs: list[tuple[bool, bool, int]], times: int) -> None:
    before, after, prompts = [b for b, _, _ in pairs], [a for _, a, _ in pairs], numbered(len(pairs))
    once = mcnemar_exact(before, after, prompts)
    assert mcnemar_exact(before * times, after * times, prompts * times) == pytest.approx(once, rel=1e-9)


@settings(max_examples=25)
@given(PAIRS)
def test_swapped_models_negate_the_difference_and_keep_the_p_value(pairs: list[tuple[bool, bool, int]]) -> None:
    before, after, prompts = [b for b, _, _ in pairs], [a for _, a, _ in pairs], [str(p) for _, _, p in pairs]
    forward, backward = paired_difference(before, after, prompts), paired_difference(after, before, prompts)
    assert (forward.value, forward.low, forward.high) == pytest.approx(
        (-backward.value, -backward.high, -backward.low), abs=1e-6
    )
    assert -100 <= forward.low <= forward.value + 1e-9
    assert forward.value - 1e-9 <= forward.high <= 100
    assert forward.low < forward.high
    assert mcnemar_exact(before, after, prompts) == pytest.approx(mcnemar_exact(after, before, prompts))


def test_a_difference_that_the_test_detects_has_an_interval_without_zero() -> None:
    for lost in range(12):
        for gained in range(lost, 40):
            before, after = [True] * lost + [False] * (150 - lost), [False] * lost + [True] * gained
            after += [False] * (150 - len(after))
            if mcnemar_exact(before, after, numbered(150)) < 0.05:
                assert paired_difference(before, after, numbered(150)).low > 0


def test_pairs_detect_what_two_intervals_hide() -> None:
    before, after = nested([30, 18])
    first, second = (estimate_rate(list(hits), numbered(150)) for hits in (before, after))
    assert second.high > first.low
    assert mcnemar_exact(list(before), list(after), numbered(150)) < 0.001
    assert paired_difference(before, after, numbered(150)).high < 0


def test_one_seed_has_the_interval_of_its_prompts() -> None:
    for prompts in (numbered(150), [str(i % 40) for i in range(150)]):
        hits = nested([20])
        assert seed_and_prompt_interval(hits, prompts) == estimate_rate(list(hits[0]), prompts)


@pytest.mark.parametrize("count", [1, 5, 40, 75, 149])
def test_an_interval_over_seeds_is_never_narrower_than_that_of_one_run(count: int) -> None:
    (alone,) = (estimate_rate(list(hits), numbered(150)) for hits in nested([count]))
    agreeing, differing = (
        seed_and_prompt_interval(nested(counts), numbered(150))
        for counts in ([count] * 3, [count - 1, count, count + 1])
    )
    assert agreeing.high - agreeing.low >= alone.high - alone.low
    assert differing.high - differing.low > agreeing.high - agreeing.low


@pytest.mark.slow
@settings(max_examples=15)
@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=2, max_size=4), st.integers(3, 12))
def test_an_interval_over_seeds_contains_those_of_seeds_and_of_prompts(hits: list[list[bool]], count: int) -> None:
    prompts = [str(i % count) for i in range(12)]
    rate = seed_and_prompt_interval(hits, prompts)
    student = student_interval([100 * float(np.mean(row)) for row in hits])
    pooled = estimate_rate(list(np.concatenate(hits)), prompts * len(hits))
    assert rate.value == pytest.approx(pooled.value)
    assert rate.high - rate.low >= pooled.high - pooled.low - 3  # both ends are estimated from draws
    assert rate.low <= max(0, student.low) + 1e-6
    assert rate.high >= min(100, student.high) - 1e-6


def test_intervals_cover_the_true_rate_and_the_true_difference() -> None:
    """Prompts and seeds shift the log-odds; the second model's are lower by one."""
    rng = np.random.default_rng(7)

    def rates(shift: float, prompt: np.ndarray, seed: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(shift - prompt - seed))

    population = rng.normal(size=200_000) * 2, rng.normal(size=200_000) * 0.5
    true_rate, true_second = (100 * float(rates(shift, *population).mean()) for shift in (1, 2))
    covered = [0, 0]
    for _ in range(40):
        prompt, seeds = rng.normal(size=60) * 2, rng.normal(size=(2, 3, 1)) * 0.5
        first, second = (rng.random((3, 60)) < rates(1 + i, prompt, seeds[i]) for i in (0, 1))
        rate = seed_and_prompt_interval(first, numbered(60))
        difference = paired_difference(first, second, numbered(60))
        covered[0] += rate.low <= true_rate <= rate.high
        covered[1] += difference.low <= true_second - true_rate <= difference.high
    assert min(covered) >= 36
