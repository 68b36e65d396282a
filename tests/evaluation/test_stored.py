"""Damaged lines of responses.jsonl, judged.jsonl and of stores of verdicts are never used."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lisa_lightning.evaluation.evaluator import (
    Answer,
    Question,
    _resume_answers,
    _with_origin,
    read_answers,
    write_answers,
)
from lisa_lightning.evaluation.judging import Judged, judge_answers, read_judged
from lisa_lightning.judge.base import Judge, Metric, Pair, Verdict
from lisa_lightning.runtime.errors import UserError


class Counting:
    """Judge that gives every answer a verdict of its own, and records the answers that it gets."""

    metric: ClassVar[Metric] = "harmful_score"
    version = "1"

    def __init__(self) -> None:
        self.judged: list[str] = []

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        for pair in pairs:
            self.judged.append(pair.response)
            score = int(pair.response.split()[1]) / 64
            yield Verdict(score > 0.1, score, refused=score > 0.2, categories={"of a kind": score > 0.3})


class Constant:
    """Judge that gives every answer the same verdict."""

    metric: ClassVar[Metric] = "harmful_score"
    version = "1"

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict]:
        yield from (self.verdict for _ in pairs)


ANSWERS = [Answer("final", "harmful", i, f"request {i}", "", f"answer {i}") for i in range(20)]


def judged(judge: Judge, out: Path, cache: Path) -> list[Judged]:
    out.mkdir(exist_ok=True)
    return judge_answers({"counting": judge}, ANSWERS, out, cache)


def stored(folder: Path) -> tuple[list[Judged], Path, bytes]:
    """Return the verdicts on all answers, the store that holds them, and its content."""
    truth = judged(Counting(), folder / "first", folder / "cache")
    (store,) = (folder / "cache" / "verdicts").glob("*.jsonl")
    return truth, store, store.read_bytes()


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Return the content with a few bits flipped, bytes overwritten, cut out, put in, or its end cut off."""
    changed = bytearray(content)
    at, length = chance.randrange(len(content)), chance.randrange(1, 9)
    match chance.randrange(5):
        case 0:
            changed[at] ^= 1 << chance.randrange(8)
        case 1:
            changed[at : at + length] = chance.randbytes(length)
        case 2:
            del changed[at : at + length]
        case 3:
            changed[at:at] = chance.randbytes(length)
        case _:
            del changed[at:]
    return bytes(changed)


@pytest.mark.slow
def test_no_damage_to_a_store_changes_a_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth, store, whole = stored(tmp_path)
    chance = random.Random(0)
    for number in range(150):
        store.write_bytes(damaged(whole, chance))
        again = Counting()
        assert judged(again, tmp_path / f"out {number}", tmp_path / "cache") == truth
        assert len(again.judged) <= len(ANSWERS)
        # The next judging finds all verdicts and no damage.
        caplog.clear()
        idle = Counting()
        assert judged(idle, tmp_path / f"next {number}", tmp_path / "cache") == truth
        assert (idle.judged, caplog.text) == ([], "")


@pytest.mark.parametrize(
    "change",
    [
        {"score": 0.5},
        {"score": float("nan")},
        {"score": "0.5"},
        {"score": True},
        {"flagged": "yes"},
        {"flagged": 1},
        {"refused": 0},
        {"categories": []},
        {"categories": {"a": 1}},
        {"pair": 3},
        {"checksum": None},
        {"partly": "no"},
        {"more": 1},
    ],
)
def test_a_line_of_a_store_with_another_value_is_judged_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    truth, store, whole = stored(tmp_path)
    lines = whole.decode().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    store.write_text("\n".join(lines) + "\n")
    again = Counting()
    assert judged(again, tmp_path / "again", tmp_path / "cache") == truth
    assert again.judged == ["answer 2"]
    assert f"1 damaged line(s) in {store} are judged again" in caplog.text
    assert len(caplog.records) == 1


def test_a_store_that_lost_its_last_line_end_loses_no_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    truth, store, whole = stored(tmp_path)
    store.write_bytes(whole.rstrip(b"\n"))
    again = Counting()
    assert judged(again, tmp_path / "again", tmp_path / "cache") == truth
    assert (again.judged, caplog.text, store.read_bytes()) == ([], "", whole)


def test_a_store_that_is_no_file_is_refused(tmp_path: Path) -> None:
    _, store, _ = stored(tmp_path)
    store.unlink()
    store.mkdir()
    with pytest.raises(
        UserError, match=rf"{store}: it is a folder\. Fix: delete {store}, or name another .* cache_dir"
    ):
        judged(Counting(), tmp_path / "again", tmp_path / "cache")


def test_the_store_precedes_judged_jsonl(tmp_path: Path) -> None:
    truth, _, _ = stored(tmp_path)
    path = tmp_path / "first" / "judged.jsonl"
    lines = [json.dumps(asdict(j) | {"flagged": not j.flagged, "score": 0.9}) for j in truth]
    path.write_text("\n".join(lines) + "\n")
    again = Counting()
    assert judged(again, tmp_path / "first", tmp_path / "cache") == truth
    assert again.judged == []


@pytest.mark.parametrize("verdict", [Verdict(True, float("nan")), Verdict(True, 3.0), Verdict("yes", 1.0)])  # type: ignore[arg-type]
def test_a_verdict_that_could_not_be_read_back_is_refused(tmp_path: Path, verdict: Verdict) -> None:
    with pytest.raises(UserError, match=r"judge=counting: invalid verdict, .* is not .*\. Fix: "):
        judged(Constant(verdict), tmp_path, tmp_path / "cache")


DAMAGE = {
    b"": "broken JSON",
    b"{": "broken JSON",
    b"\xff{}": "not UTF-8",
    b"\x00\x01": "broken JSON",
    b"[]": "not a JSON object",
    b"null": "not a JSON object",
    b"{}": "field 'model' is missing",
    b"[" * 100_000: "broken JSON",
    b'{"model": "a", "model": "b"}': "a field occurs twice",
}
WRONG_VERDICT = [
    {"flagged": "yes"},
    {"flagged": None},
    {"score": float("nan")},
    {"score": float("inf")},
    {"score": 7},
    {"score": "1"},
    {"refused": "no"},
    {"partly": 1},
    {"categories": None},
    {"graded": None},
    {"metric": "score"},
    {"version": 1},
    {"pair": []},
    {"judge": {}},
]
WRONG_ANSWER = [
    {"model": 1},
    {"kind": "other"},
    {"kind": None},
    {"index": -1},
    {"index": 1.0},
    {"index": True},
    {"index": "1"},
    {"prompt": None},
    {"response": ["answer"]},
    {"response": "\ud800"},
    {"more": 1},
]
ONLY_ANSWER = [
    {"target": 1},
    {"context": None},
    {"cut_off": 0},
    {"cut_off": "false"},
    {"origin": None},
    {"correct": 1},
    {"sample": -1},
    {"prompt_set": 1},
]


OPTIONAL = {"graded", "sample", "prompt_set"}
"""Fields that lines of earlier versions lack."""


def refused_lines(good: dict[str, Any], wrong: list[dict[str, Any]]) -> list[tuple[bytes, str]]:
    """Return lines that must be refused, each with a part of its message."""
    lines = [(line, problem.replace("model", next(iter(good)))) for line, problem in DAMAGE.items()]
    lines += [(json.dumps(good | change).encode(), next(iter(change))) for change in wrong]
    short = ({key: value for key, value in good.items() if key != gone} for gone in good.keys() - OPTIONAL)
    return lines + [(json.dumps(row).encode(), "is missing") for row in short]


def test_damaged_lines_of_judged_jsonl_are_refused(tmp_path: Path) -> None:
    first, second, *_ = judged(Counting(), tmp_path, tmp_path / "cache")
    path = tmp_path / "judged.jsonl"
    start = json.dumps(asdict(first)).encode() + b"\n"
    fix = f"Fix: delete {path}; verdicts are made again (paid ones come from the cache)"
    for line, _ in refused_lines(asdict(second), WRONG_VERDICT + WRONG_ANSWER):
        path.write_bytes(start + line + b"\n" + start)
        with pytest.raises(UserError) as refused:
            read_judged(path)
        assert str(refused.value).startswith(f"{path}, line 2: "), line[:80]
        assert str(refused.value).endswith(fix)
        assert len(str(refused.value)) < 400
    earlier = {key: value for key, value in asdict(first).items() if key not in OPTIONAL}
    path.write_text(json.dumps(earlier) + "\n", encoding="utf-8")
    assert read_judged(path) == [first]
    path.write_bytes(start + start.rstrip())
    with pytest.raises(UserError, match=r"line 2: the end of the line is missing"):
        read_judged(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="it is a folder"):
        read_judged(path)


def test_damaged_lines_of_responses_jsonl_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    write_answers(path, ANSWERS[:1])
    start = path.read_bytes()
    fix = f"Fix: delete {path} and repeat the run's command with resume=true; finished answers come from the cache"
    answer = asdict(ANSWERS[1])
    # Answers of earlier versions have no verdict.
    del answer["correct"]
    for line, problem in refused_lines(answer, WRONG_ANSWER + ONLY_ANSWER):
        path.write_bytes(start + line + b"\n" + start)
        with pytest.raises(UserError) as refused:
            read_answers(path)
        assert str(refused.value).startswith(f"{path}, line 2: "), line[:80]
        assert problem in str(refused.value)
        assert str(refused.value).endswith(fix)
    path.write_bytes(start + json.dumps(answer).encode() + b"\n" + start[:-5])
    assert read_answers(path) == ANSWERS[:2]


def test_only_answers_as_they_were_written_are_reused(tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    questions = [Question("task", f"request {i}", "context", f"target {i}") for i in range(3)]
    plain = [Answer("final", q.kind, i, q.prompt, q.context, "answer", q.target) for i, q in enumerate(questions)]
    valid = [_with_origin(answer, "one evaluation") for answer in plain]
    other = replace(plain[0], model="aligned", origin="another")
    write_answers(path, [other, *valid])
    assert _resume_answers(path, "final", "one evaluation", questions) == dict(enumerate(valid))
    changes: list[dict[str, Any]] = [
        *({name: "Answer"} for name in ("prompt", "context", "response", "target", "origin")),
        *({"kind": "harmful"}, {"index": 1}, {"index": 7}, {"cut_off": True}),
    ]
    for change in changes:
        write_answers(path, [other, replace(valid[0], **change), valid[2]])
        assert _resume_answers(path, "final", "one evaluation", questions) == {2: valid[2]}, change
        assert read_answers(path) == [other, valid[2]]
    # A verdict is no part of what was generated.
    judged_ones = [replace(answer, correct=True) for answer in valid]
    write_answers(path, judged_ones)
    assert _resume_answers(path, "final", "one evaluation", questions) == dict(enumerate(judged_ones))
    for others in (questions[:2], [questions[0], questions[2], questions[1]], []):
        write_answers(path, valid)
        assert len(_resume_answers(path, "final", "one evaluation", others)) == sum(
            q in others[i : i + 1] for i, q in enumerate(questions)
        )
    write_answers(path, valid)
    assert _resume_answers(path, "final", "another evaluation", questions) == {}
