"""Agreement of judges: kappa equals scikit-learn's, and its interval covers the true value as often as it says."""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from lisa_lightning.evaluation.agreement import judge_agreements, read_agreements
from lisa_lightning.evaluation.judging import Judged
from lisa_lightning.evaluation.scores import read_scores

Flags = Sequence[bool]


def judged(judge: str, flags: Flags, prompts: Sequence[str] | None = None, kind: str = "harmful") -> list[Judged]:
    metric = "refusal_rate" if judge == "refusal" else "harmful_score"
    texts = prompts or [f"prompt {i}" for i in range(len(flags))]
    return [
        Judged(judge, flag, 0.5, prompt, "text", None, {}, None, metric, "final", kind, i, "1", "")
        for i, (flag, prompt) in enumerate(zip(flags, texts, strict=True))
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=30))
def test_kappa_is_that_of_scikit_learn(pairs: list[tuple[bool, bool]]) -> None:
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    (agreement,) = judge_agreements([*judged("a", first), *judged("b", second)])
    assert agreement.equal == 100 * np.mean(np.equal(first, second))
    if 1 in (len({*first}), len({*second})):
        assert agreement.kappa is None
    else:
        assert agreement.kappa == pytest.approx(cohen_kappa_score(first, second))
        ordered = [value for value in (agreement.low, agreement.kappa, agreement.high) if value is not None]
        assert ordered == sorted(ordered)
        assert len(ordered) == (1 if first == second else 3)
    assert [asdict(a) for a in read_agreements(agreement.entries)] == [asdict(agreement)]
    assert read_scores(agreement.entries) == []


def test_the_interval_covers_the_true_kappa() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(40):
        first = rng.random(60) < 0.5
        second = first ^ (rng.random(60) < 0.2)  # kappa is 1 - 2 * 0.2 for equal shares
        (agreement,) = judge_agreements([*judged("a", first.tolist()), *judged("b", second.tolist())])
        assert agreement.low is not None
        assert agreement.high is not None
        covered += agreement.low <= 0.6 <= agreement.high
    assert 34 <= covered <= 40


def test_repeated_prompts_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    first, second = (np.repeat(rng.random(20) < 0.5, 6).tolist() for _ in range(2))
    lines = judged("a", first), judged("b", second)
    same = [f"prompt {i // 6}" for i in range(120)]
    repeated = judged("a", first, same), judged("b", second, same)
    (alone,), (together,) = (judge_agreements([*a, *b]) for a, b in (lines, repeated))
    assert alone.kappa == together.kappa
    assert together.high - together.low > 1.5 * (alone.high - alone.low)  # type: ignore[operator]


def test_only_judges_of_the_harmful_score_are_compared_and_only_on_harmful_requests() -> None:
    lines = [
        *judged("a", [True, False, True]),
        *judged("refusal", [True, False, True]),
        *judged("b", [True, False]),
        *judged("b", [True, True, True], kind="harmless"),
        *judged("c", [False, False, True]),
    ]
    agreements = judge_agreements(lines)
    assert [(a.first, a.second, a.answers) for a in agreements] == [("a", "b", 2), ("a", "c", 3), ("b", "c", 2)]
