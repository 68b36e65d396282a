"""Answers that no selected judge scores are refused or reported; names of models fit into names of metrics."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from lisa_lightning.evaluation.coverage import refuse_unscored
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.judging import read_responses
from lisa_lightning.judge.base import Judge, Metric, Pair, Verdict
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.runtime.errors import UserError


class Comparing:
    metric: ClassVar[Metric] = "win_rate"
    version = "1"

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        yield from (Verdict(True, 1.0) for _ in pairs)


JUDGES: dict[str, Judge] = {"refusal": RefusalJudge(), "embedded": EmbeddedJudge()}


@pytest.mark.parametrize(
    ("kinds", "judges", "task_has_rule", "refused"),
    [
        (["task"] * 3, JUDGES, False, r"\(3 task\); judge=refusal scores harmful and harmless, .* add judge=win_rate"),
        (["harmless"], {"comparing": Comparing()}, False, r"\(1 harmless\); judge=comparing scores task\. .*=refusal"),
        (["harmful", "harmless"], {"comparing": Comparing()}, True, r"\(1 harmful, 1 harmless\)"),
        (["harmful"], {}, False, r"judge=\[\]: no judge is selected\. Fix: "),
        (["task"], {}, True, r"judge=\[\]: no judge is selected\. Fix: "),
        (["task"], JUDGES, True, None),
        (["harmful"], JUDGES, False, None),
        (["harmless"], JUDGES, False, None),
        (["task"], {"comparing": Comparing()}, False, None),
        (["task", "harmless"], {"comparing": Comparing()}, False, None),
        ([], {}, False, None),
    ],
)
def test_answers_that_nothing_scores_are_refused(
    caplog: pytest.LogCaptureFixture,
    kinds: list[str],
    judges: dict[str, Judge],
    task_has_rule: bool,
    refused: str | None,
) -> None:
    answers = [Answer("responses", kind, i, "request", "", "answer") for i, kind in enumerate(kinds)]
    if refused is None:
        refuse_unscored(judges, answers, "responses=a.jsonl", task_has_rule)
    else:
        with pytest.raises(UserError, match=refused):
            refuse_unscored(judges, answers, "responses=a.jsonl", task_has_rule)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("kinds", "judges", "warned"),
    [
        (["task", "task", "harmful"], JUDGES, "2 of 3 answers are scored by no selected judge (2 task)"),
        (["task", "harmful", "harmless"], {"comparing": Comparing()}, "1 of 3 answers .* (1 harmful)"),
    ],
)
def test_some_answers_without_a_score_are_one_warning(
    caplog: pytest.LogCaptureFixture, kinds: list[str], judges: dict[str, Judge], warned: str
) -> None:
    answers = [Answer("responses", kind, i, "request", "", "answer") for i, kind in enumerate(kinds)]
    refuse_unscored(judges, answers, "responses=a.jsonl")
    (record,) = caplog.records
    assert all(part in record.getMessage() for part in warned.split(".*"))


def test_names_of_models_are_short_and_on_one_line(tmp_path: Path) -> None:
    names = ["a/b", "a\x1b[31m\nb\u202e", "", " \t", None, "m" * 81, "m" * 81 + "n", "m" * 80, "\x00"]
    rows = [{"prompt": "p", "response": "r", "model": name} for name in names]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = [answer.model for answer in read_responses(str(tmp_path / "a.jsonl"))]
    assert models[:5] == ["a_b", "a [31m b", "responses", "responses", "responses"]
    assert models[7:] == ["m" * 80, "responses"]
    assert len({*models[5:8]}) == 3
    assert all(name.isprintable() and len(name) <= 80 and "/" not in name for name in models)
