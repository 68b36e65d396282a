"""Scores of named prompt sets, their questions, and cache keys and files that have no sets."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.evaluator import (
    Answer,
    Question,
    _question_fields,
    _with_origin,
    held_out_questions,
    read_answers,
)
from lisa_lightning.evaluation.judging import Judged, read_responses
from lisa_lightning.evaluation.metrics import judged_scores
from lisa_lightning.report.set_table import ALL_SETS, set_tables
from lisa_lightning.runtime.cache import short_hash

NAMES = ("", "one", "two")


def rows(harmful: dict[str, list[str]], harmless: dict[str, list[str]]) -> Rows:
    return Rows([], [], [], [Row("task", "", "yes")], harmful, harmless, [], {})


@given(
    st.dictionaries(st.sampled_from(NAMES), st.lists(st.text(max_size=2), min_size=1, max_size=5)), st.integers(1, 9)
)
def test_questions_take_the_sets_in_turn(sets: dict[str, list[str]], count: int) -> None:
    """All prompts of each set are asked in its order. The first questions contain equally many of every set."""
    asked = held_out_questions(rows(sets, {}), task=0)
    assert {name: [q.prompt for q in asked if q.prompt_set == name] for name in sets} == sets
    first = held_out_questions(rows(sets, {}), count, task=0)
    assert first == asked[:count]
    counts = {name: sum(q.prompt_set == name for q in first) for name in sets}
    unfinished = [counts[name] for name in sets if counts[name] < len(sets[name])]
    assert all(most - few <= 1 for few in unfinished for most in counts.values())


def test_sets_of_both_kinds_are_asked_with_all_samples() -> None:
    asked = held_out_questions(rows({"one": ["a"], "two": ["b"]}, {"one": ["c"]}), samples=2)
    found = [(q.kind, q.prompt, q.prompt_set, q.sample) for q in asked]
    assert found[:4] == [("harmful", p, name, i) for p, name in (("a", "one"), ("b", "two")) for i in (0, 1)]
    assert found[4:] == [*(("harmless", "c", "one", i) for i in (0, 1)), ("task", "task", "", 0)]


def test_a_single_set_changes_no_cache_key_and_no_origin() -> None:
    """Earlier versions had neither the field of questions nor that of answers."""
    question, answer = Question("harmful", "a"), Answer("final", "harmful", 0, "a", "", "b")
    assert _question_fields(question) == {"kind": "harmful", "prompt": "a", "context": "", "target": ""}
    assert _question_fields(replace(question, prompt_set="one"))["prompt_set"] == "one"
    earlier = {k: v for k, v in asdict(answer).items() if k != "prompt_set"}
    assert _with_origin(answer, "x").origin == short_hash(["x", earlier])
    origins = {_with_origin(replace(answer, prompt_set=name), "x").origin for name in NAMES}
    assert len(origins) == len(NAMES)


def test_answers_of_earlier_versions_are_read(tmp_path: Path) -> None:
    answer = Answer("final", "harmful", 0, "a", "", "b")
    earlier = {k: v for k, v in asdict(answer).items() if k != "prompt_set"}
    (tmp_path / "responses.jsonl").write_text(json.dumps(earlier) + "\n")
    assert read_answers(tmp_path / "responses.jsonl") == [answer]


def test_a_users_file_may_name_sets(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    lines: list[dict[str, Any]] = [{"prompt_set": "a/b"}, {"prompt_set": ""}, {"prompt_set": "one", "kind": "task"}]
    file.write_text("".join(json.dumps({"prompt": "p", "response": "r"} | line) + "\n" for line in lines))
    assert [answer.prompt_set for answer in read_responses(str(file))] == ["a_b", "", ""]


def verdict(index: int, prompt_set: str, kind: str, flagged: bool, judge: str) -> Judged:
    metric = "refusal_rate" if judge == "refusal" else "harmful_score"
    refused = not flagged if judge == "refusal" else None
    texts = {"prompt": f"prompt {index % 4}", "response": "r", "model": "final", "version": "1", "pair": ""}
    return Judged(
        judge,
        flagged,
        float(flagged),
        **texts,
        refused=refused,
        categories={},
        partly=index % 3 == 0,
        metric=metric,
        kind=kind,
        index=index,
        graded=judge == "graded",
        sample=index % 2,
        prompt_set=prompt_set,
    )


VERDICTS = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(["harmful", "harmless"]), st.booleans()), max_size=12
)


@given(VERDICTS, st.sampled_from(["refusal", "graded"]))
def test_scores_of_a_set_are_those_of_its_answers_alone(drawn: Sequence[tuple[str, str, bool]], judge: str) -> None:
    lines = [verdict(i, *of_answer, judge) for i, of_answer in enumerate(drawn)]
    scores = judged_scores(lines)
    without = judged_scores([replace(line, prompt_set="") for line in lines])
    assert [score for score in scores if not score.prompt_set] == without
    for name in NAMES[1:]:
        alone = judged_scores([replace(line, prompt_set="") for line in lines if line.prompt_set == name])
        assert [replace(score, prompt_set="") for score in scores if score.prompt_set == name] == alone


def test_tables_have_a_row_for_each_set_and_first_for_all() -> None:
    drawn = [("one", "harmful", True), ("two", "harmful", False), ("two", "harmless", True), ("two", "harmful", True)]
    lines = [verdict(i, *of_answer, judge) for judge in ("graded", "refusal") for i, of_answer in enumerate(drawn)]
    columns = {"aligned": "before", "final": "after"}
    harmful, harmless = set_tables(judged_scores(lines), columns)
    assert harmful.heads == ["Harmful score, after", "Refusal rate, after"]
    assert [(row.title, [value for value, _ in row.values], row.answers) for row in harmful.rows] == [
        (ALL_SETS, ["66.7", "33.3"], 3),
        ("one", ["100.0", "0.0"], 1),
        ("two", ["50.0", "50.0"], 2),
    ]
    assert [(row.title, row.values[0][0]) for row in harmless.rows] == [(ALL_SETS, "0.0"), ("two", "0.0")]
    assert set_tables(judged_scores([replace(line, prompt_set="") for line in lines]), columns) == []
