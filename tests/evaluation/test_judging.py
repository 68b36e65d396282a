"""Stored answers, judges side by side, shares and intervals."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.judging import judge_answers, read_judged, read_responses, refuse_no_reference
from lisa_lightning.evaluation.metrics import curve_scores, judged_scores, task_scores, verdict_word
from lisa_lightning.evaluation.rates import estimate_rate
from lisa_lightning.evaluation.scores import score_metrics
from lisa_lightning.judge.base import Metric, Pair, Verdict
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.pipeline.stages.judge import judge
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.task.alpaca import Alpaca
from lisa_lightning.task.sst2 import SST2


class Shouting:
    """Judge that flags capitals, records the pairs that it is asked, and may stop after some verdicts."""

    metric: ClassVar[Metric] = "harmful_score"

    def __init__(self, version: str = "1", stop_after: int | None = None) -> None:
        self.version = version
        self.stop_after = stop_after
        self.asked: list[Pair] = []

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        for i, pair in enumerate(pairs):
            if i == self.stop_after:
                raise UserError("no more")
            self.asked.append(pair)
            yield Verdict(pair.response.isupper(), float(pair.response.isupper()), categories={"loud": True})


class Longer:
    """Judge that prefers an answer that is longer than the reference."""

    metric: ClassVar[Metric] = "win_rate"
    version = "1"

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        yield from (Verdict(len(p.response) > len(p.reference), 1.0) for p in pairs)


def answers(*responses: str, kind: str = "harmful", stage: str = "final", target: str = "") -> list[Answer]:
    return [Answer(stage, kind, i, f"prompt {i}", "", r, target) for i, r in enumerate(responses)]


HARMFUL, HARMLESS = ("harmful_score", True, None), ("harmful_score", False, None)
REFUSED, ANSWERED = ("refusal_rate", False, True), ("refusal_rate", True, False)


@pytest.mark.parametrize(
    ("kind", "response", "verdicts", "word"),
    [
        ("task", "positive", [HARMLESS], "correct"),
        ("task", "positive, I think", [HARMLESS], "correct, and more"),
        ("task", "dunno", [HARMLESS], "wrong"),
        ("harmful", "x", [], "not judged"),
        ("harmful", "x", [("win_rate", True, None)], "preferred"),
        ("harmful", "x", [("win_rate", False, None)], "not preferred"),
        ("harmful", "x", [HARMLESS, REFUSED], "refused"),
        ("harmful", "x", [REFUSED, HARMLESS], "refused"),
        ("harmful", "x", [HARMFUL, REFUSED], "flagged"),
        ("harmful", "x", [HARMFUL, HARMLESS], "flagged"),
        ("harmful", "x", [HARMLESS, HARMFUL, ANSWERED], "not flagged"),
        ("harmful", "x", [("harmful_score", False, True), ANSWERED], "not flagged"),
        ("harmful", " ", [HARMLESS, ANSWERED], "empty"),
        ("harmful", "x", [ANSWERED], "not refused"),
        ("harmless", "x", [HARMFUL, ANSWERED], "answered"),
        ("harmless", "x", [HARMFUL, REFUSED], "refused"),
        ("harmless", "x", [HARMFUL], "not judged"),
    ],
)
def test_the_word_for_an_answer(
    kind: str, response: str, verdicts: list[tuple[str, bool, bool | None]], word: str
) -> None:
    (answer,) = answers(response, kind=kind, target="positive")
    judged: list[Any] = [
        SimpleNamespace(metric=m, flagged=flagged, refused=refused) for m, flagged, refused in verdicts
    ]
    assert verdict_word(SST2(), answer, judged) == word


def test_no_answer_is_judged_twice_by_one_judge_and_version(tmp_path: Path) -> None:
    judge = Shouting()
    first = judge_answers({"loud": judge}, answers("A", "b", "A"), tmp_path, tmp_path / "cache")
    assert [(j.judge, j.flagged, j.index) for j in first] == [("loud", True, 0), ("loud", False, 1), ("loud", True, 2)]
    assert len(judge.asked) == 3  # other prompts
    assert judge_answers({"loud": judge}, answers("A", "b", "A"), tmp_path, tmp_path / "cache") == first
    (again := tmp_path / "again").mkdir()
    judge_answers({"loud": judge}, answers("A", "b", "A", "c"), again, tmp_path / "cache")
    assert len(judge.asked) == 4
    judge_answers({"loud": judge}, answers("A", "b", "A"), tmp_path, tmp_path / "no cache")
    assert len(judge.asked) == 4  # the folder itself remembers
    newer = Shouting("2")
    judge_answers({"loud": newer}, answers("A", "b", "A"), tmp_path, tmp_path / "cache")
    assert len(newer.asked) == 3


def test_judges_stand_side_by_side_in_the_order_of_the_answers(tmp_path: Path) -> None:
    asked = answers("I can't help with that.", "SURE", "No. I won't do that.")
    judge_answers({"loud": Shouting()}, asked, tmp_path, tmp_path)
    both = judge_answers({"refusal": RefusalJudge()}, asked, tmp_path, tmp_path)
    assert [(j.judge, j.response) for j in both] == [
        (judge, a.response) for judge in ("refusal", "loud") for a in asked
    ]
    assert [j.flagged for j in both] == [False, True, False] * 2
    lines = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert {"judge", "flagged", "score", "prompt", "response"} <= set(lines[0])
    assert read_judged(tmp_path / "judged.jsonl") == both


def test_a_judge_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    asked = answers("a", "B", "c", "D")
    with pytest.raises(UserError, match="no more"):
        judge_answers({"loud": Shouting(stop_after=2)}, asked, tmp_path, tmp_path)
    assert not (tmp_path / "judged.jsonl").exists()
    store = next((tmp_path / "verdicts").glob("*.jsonl"))
    store.write_text(store.read_text()[:-5])  # as a kill in the middle of a line leaves it
    judge = Shouting()
    found = judge_answers({"loud": judge}, asked, tmp_path, tmp_path)
    assert [p.response for p in judge.asked] == ["B", "c", "D"]
    assert [j.flagged for j in found] == [False, True, False, True]
    assert len({json.loads(line)["pair"] for line in store.read_text().splitlines() if line.endswith("}")}) == 4


def test_each_kind_of_answer_goes_to_its_judge(tmp_path: Path) -> None:
    asked = [*answers("A"), *answers("b", kind="harmless"), *answers("long", "s", kind="task", target="mid")]
    found = judge_answers({"loud": Shouting(), "longer": Longer()}, asked, tmp_path, tmp_path)
    assert [(j.judge, j.kind) for j in found] == [("loud", "harmful"), ("loud", "harmless")] + [("longer", "task")] * 2
    # The loud judge detects no refusals.
    assert [(s.judge, s.metric, s.value, s.answers) for s in judged_scores(found)] == [
        ("loud", "harmful_score", 100.0, 1),
        ("loud", "category/loud", 1, None),
        ("longer", "win_rate", 50.0, 2),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("own.jsonl", '{"prompt": "p", "response": "No."}\n{"prompt": "q", "response": ""}\n'),
        ("own.csv", "prompt,response,more\np,No.,1\nq,,2\n"),
    ],
)
def test_a_file_of_ones_own_keeps_its_order(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = read_responses(str(tmp_path / name))
    assert [(a.prompt, a.response, a.model, a.kind) for a in found] == [
        ("p", "No.", "responses", "harmful"),
        ("q", "", "responses", "harmful"),
    ]


def test_a_comparison_needs_something_to_compare_with(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "response": "r", "kind": kind, "target": "t"} for kind in ("task", "harmful", "task")]
    del rows[1]["target"]
    for content, judges in ((rows, {"longer": Longer()}), ([*rows, rows[1] | {"kind": "task"}], {"loud": Shouting()})):
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, content)))
        refuse_no_reference(judges, found := read_responses(str(tmp_path / "a.jsonl")), "a.jsonl")
    with pytest.raises(UserError, match=r"a\.jsonl: judge=longer compares .* answer 4 has none\. Fix: add a `target`"):
        refuse_no_reference({"longer": Longer()}, found, "a.jsonl")


def test_columns_of_ones_own_that_are_called_like_ours_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "p", "response": "r", "kind": "homonyms", "context": "of theirs"}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(r) for r in (row, row | {"kind": "harmless"})))
    assert [(a.prompt, a.context, a.kind) for a in read_responses(str(tmp_path / "a.jsonl"))] == [
        ("p", "", "harmful"),
        ("p", "", "harmless"),
    ]
    assert "unknown kind homonyms counts as harmful" in caplog.text


def test_verdicts_on_other_answers_are_not_kept_among_these(tmp_path: Path) -> None:
    judge_answers({"loud": Shouting()}, answers("A", "b"), tmp_path, tmp_path)
    found = judge_answers({"refusal": RefusalJudge()}, answers("other", "b"), tmp_path, tmp_path)
    assert [(j.judge, j.response) for j in found] == [("refusal", "other"), ("refusal", "b"), ("loud", "b")]


def test_wilson_where_every_answer_has_a_prompt_of_its_own() -> None:
    rate = estimate_rate([True] * 8 + [False] * 2, [str(i) for i in range(10)])
    wilson = binomtest(8, 10).proportion_ci(0.95, "wilson")
    assert (rate.value, rate.answers) == (80.0, 10)
    assert (rate.low, rate.high) == pytest.approx((100 * wilson.low, 100 * wilson.high))


def test_prompts_that_are_asked_again_bring_no_certainty() -> None:
    hits, prompts = [True] * 30 + [False] * 20, [str(i) for i in range(50)]
    once, thrice = estimate_rate(hits, prompts), estimate_rate(hits * 3, prompts * 3)
    assert (once.value, thrice.value, thrice.answers) == (60.0, 60.0, 150)
    assert thrice.high - thrice.low == pytest.approx(once.high - once.low, rel=0.08)
    alone = estimate_rate(hits * 3, [str(i) for i in range(150)])
    assert alone.high - alone.low < 0.7 * (thrice.high - thrice.low)


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=30))
def test_an_interval_holds_its_share_and_stays_within_bounds(found: list[tuple[bool, int]]) -> None:
    s = estimate_rate([hit for hit, _ in found], [str(prompt) for _, prompt in found])
    assert 0 <= s.low <= s.value + 1e-9
    assert s.value - 1e-9 <= s.high <= 100
    assert s.high > s.low


def test_accuracy_strict_lenient_and_what_was_cut_off() -> None:
    asked = answers("positive", "It is positive", "bad", kind="task", target="positive")
    asked.append(Answer("final", "task", 3, "p", "", "The film is", "positive", cut_off=True))
    scores = {score.metric: score for score in task_scores(SST2(), "final", [*asked, *answers("x")])}
    assert [scores[n].value for n in ("accuracy", "lenient_accuracy", "cut_off")] == [25.0, 50.0, 25.0]
    assert scores["accuracy"].answers == 4
    assert [score.metric for score in task_scores(Alpaca(), "final", asked)] == ["cut_off"]
    assert task_scores(SST2(), "final", answers("x")) == []


def test_every_score_comes_with_interval_and_count(tmp_path: Path) -> None:
    asked: list[Any] = [*answers("No.", "sure"), *answers("No.", "yes", "well", "sure", kind="harmless")]
    scores = judged_scores(judge_answers({"refusal": RefusalJudge()}, asked, tmp_path, tmp_path))
    assert [(s.model, s.judge, s.metric, s.value, s.answers) for s in scores] == [
        ("final", "refusal", "refusal_rate", 50.0, 2),
        ("final", "refusal", "over_refusal", 25.0, 4),
    ]
    assert all(s.low is not None and s.high is not None and s.low < s.value < s.high for s in scores)


class Graded:
    """Judge whose scores are the answers themselves."""

    metric: ClassVar[Metric] = "harmful_score"
    version = "1"

    def __init__(self, graded: bool) -> None:
        self.graded = graded

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        yield from (Verdict(float(p.response) >= 0.5, float(p.response)) for p in pairs)


def test_maximal_severity_counts_the_highest_grade_of_graded_judges_alone(tmp_path: Path) -> None:
    stored = [*answers("1", "0.875", "0.876", "0"), *answers("1", kind="harmless")]
    judges = {"graded": Graded(True), "binary": Graded(False), "loud": Shouting()}
    judged = judge_answers(judges, stored, tmp_path, tmp_path)
    assert [j.graded for j in judged] == [True] * 5 + [False] * 10
    scores = [(s.judge, s.value, s.answers) for s in judged_scores(judged) if s.metric == "max_severity"]
    assert scores == [("graded", 50.0, 4)]
    assert read_judged(tmp_path / "judged.jsonl") == judged


class OldEmbedded:
    """An earlier version of the embedded judge, which also had an opinion on refusals: all are."""

    metric: ClassVar[Metric] = "harmful_score"
    version = "old"

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        yield from (Verdict(False, 0.0, refused=True) for _ in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("judges", [{"embedded": EmbeddedJudge()}, {"loud": Shouting(), "refusal": RefusalJudge()}])
def test_only_the_rule_counts_refusals(tmp_path: Path, judges: dict[str, Any]) -> None:
    stored = [*answers("No.", "Sure, like this."), *answers("I can't help with that.", "B", kind="harmless")]
    judge_answers({"embedded": OldEmbedded()}, stored, tmp_path, tmp_path)
    metrics = score_metrics(judge(judges, stored, tmp_path, tmp_path).scores)
    rates = {n: v for n, v in metrics.items() if n.endswith(("refusal_rate", "over_refusal"))}
    names = [
        f"final/{name}" for name in ("refusal_rate", "over_refusal", "refusal/refusal_rate", "refusal/over_refusal")
    ]
    assert rates == dict.fromkeys(names, 50.0)
    assert "final/harmful_score" in metrics


def test_points_of_curves_count_refusals_by_the_rule() -> None:
    stored = [*answers("No.", "Sure, like this."), *answers("No, it is safe. Go ahead.", "B", kind="harmless")]
    scores = curve_scores(EmbeddedJudge(), RefusalJudge(), SST2(), stored)
    assert [(s.judge, s.metric) for s in scores] == [
        ("embedded", "harmful_score"),
        ("refusal", "refusal_rate"),
        ("refusal", "over_refusal"),
    ]
    assert [s.value for s in scores[1:]] == [50.0, 0.0]
