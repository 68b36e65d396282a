"""Test replies of servers that are no valid completions, and token counts that can't be right."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.chat_server import Server, settings, told
from lisa_lightning.judge._endpoint_reply import Completion, read_completion
from lisa_lightning.judge.base import Pair
from lisa_lightning.judge.openai import OpenAIJudge, _score
from lisa_lightning.runtime import endpoint_reply
from lisa_lightning.runtime.errors import UserError

PAIRS = [Pair("request 1", "answer 1")] * 8
RUBRIC = "{prompt}{response}" + "x" * 283  # 100 tokens by estimate, and 16 of output: 0.00026 dollars
ESTIMATE = 0.00026
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "usage", "type", "text", "prompt_tokens", "completion_tokens"]
            ),
            v,
        )
    ),
    max_leaves=12,
)


def completion(content: Any, **more: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]} | more).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        *(completion("Score: 3")[:-9], b"", b" \n", completion("Score: 3").replace(b"Score", b"\xff\xfe"), b"<html>"),
        *(b"[]", b"[1]", b"5", b"null", b"true", b'"Score: 3"', b"NaN", b"{}", b'data: {"choices": []}\n\n'),
        *(
            b'{"choices": %s}' % value
            for value in (b"null", b"[]", b"[5]", b'"abc"', b"{}", b"[null]", b"[[]]", b"[{}]")
        ),
        *(b'{"choices": [{"message": %s}]}' % value for value in (b"null", b"5", b'"Score: 3"', b"[]", b"{}")),
        *(
            completion(v)
            for v in (None, 5, True, {"text": "Score: 3"}, ["Score: 3"], [5], [], [{"type": "text", "text": 5}])
        ),
        *(b"[" * 100_000, b'{"a":' * 100_000, b" " * 2**24 + b"{}"),
        b'{"choices": [{"message": {"content": "Score: 3"}}], "usage": %s}' % (b"9" * 5000),
    ],
    ids=lambda body: body[:60].decode("latin-1"),
)
def test_a_reply_that_is_no_completion_is_requested_once_more_and_ends_in_a_sentence(url: str, body: bytes) -> None:
    replies = iter([(200, "Score: 5"), (200, body), (200, body)])
    Server.reply = staticmethod(lambda _: next(replies))
    judge = OpenAIJudge(**settings("openai", url, concurrency=1, rubric=RUBRIC))
    verdicts = judge.verdicts(PAIRS)
    assert [v.score for v in told(verdicts, 1)] == [1.0]
    assert next(verdicts) is None
    with pytest.raises(
        UserError, match=r"^judge\.openai.* answer 2 in two replies.* Finished verdicts are kept$"
    ) as error:
        next(verdicts)
    assert len(Server.asked) == 3
    assert "\n" not in str(error.value)
    assert judge.endpoint.spent == pytest.approx(0.0002 + 2 * ESTIMATE)


@pytest.mark.slow
def test_text_parts_are_joined_and_thoughts_left_out(url: str) -> None:
    parts = [{"type": "thinking", "thinking": "Score: 1"}, *({"type": "text", "text": t} for t in ("Sco", "re: 5"))]
    Server.reply = staticmethod(lambda _: (200, completion(parts)))
    assert [v.score for v in told(OpenAIJudge(**settings("openai", url)).verdicts(PAIRS[:1]))] == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "usage",
    [
        *(
            None,
            {},
            [],
            [1],
            "abc",
            5,
            True,
            {"prompt_tokens": 100},
            {"prompt_tokens": None, "completion_tokens": None},
        ),
        *(
            {"prompt_tokens": n, "completion_tokens": 10}
            for n in (-(10**9), "100", 1.5, True, float("-inf"), float("nan"), 0)
        ),
        *({"prompt_tokens": 100, "completion_tokens": n} for n in (-1, "10", 1.0, False, float("inf"), [], {})),
    ],
)
def test_an_invalid_count_of_tokens_costs_the_estimate(url: str, usage: Any) -> None:
    Server.reply = staticmethod(lambda _: (200, completion("Score: 3", usage=usage)))
    judge = OpenAIJudge(**settings("openai", url, concurrency=1, rubric=RUBRIC, max_cost_usd=3.5 * ESTIMATE))
    verdicts = judge.verdicts(PAIRS)
    assert len(told(verdicts, 3)) == 3
    assert next(verdicts) is None
    with pytest.raises(UserError, match=r"max_cost_usd=.*3 answers were judged now"):
        next(verdicts)
    assert judge.endpoint.spent == pytest.approx(3 * ESTIMATE)


def test_an_absurd_count_of_tokens_ends_at_the_cap(url: str) -> None:
    usage = {"prompt_tokens": 10**400, "completion_tokens": 1}
    Server.reply = staticmethod(lambda _: (200, completion("Score: 3", usage=usage)))
    verdicts = OpenAIJudge(**settings("openai", url, concurrency=1)).verdicts(PAIRS)
    assert len(told(verdicts, 1)) == 1
    assert next(verdicts) is None
    with pytest.raises(UserError, match="1 answers were judged now"):
        next(verdicts)


@hypothesis.settings(max_examples=40)
@given(VALUES)
def test_any_json_is_read_without_an_error(value: Any) -> None:
    for body in (value, {"choices": value}, {"choices": [{"message": value}]}, {"choices": [], "usage": value}):
        reply = read_completion([json.dumps(body).encode()], 1)
        assert reply.tokens is None or min(reply.tokens) >= 0
        assert reply.problem is None or reply.text == ""


@given(st.binary(max_size=60))
def test_any_bytes_are_read_without_an_error(body: bytes) -> None:
    assert isinstance(read_completion([body], 1), Completion)


def test_a_body_without_end_is_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(wait: float) -> Iterator[bytes]:
        while True:
            time.sleep(wait)
            yield b" " * 1000

    monkeypatch.setattr(endpoint_reply, "MAX_REPLY_BYTES", 5000)
    assert "longer than 5000 bytes" in (read_completion(endless(0), 60).problem or "")
    assert "longer than 0.01 s" in (read_completion(endless(0.004), 0.01).problem or "")


def test_a_body_that_breaks_off_is_a_problem() -> None:
    def broken() -> Iterator[bytes]:
        yield b"{"
        raise ConnectionResetError

    assert "broke off: ConnectionResetError" in (read_completion(broken(), 1).problem or "")


def test_a_request_that_timed_out_may_have_been_paid(url: str) -> None:
    def late(_: str) -> tuple[int, str]:
        time.sleep(0.5)
        return 200, "Score: 3"

    Server.reply = staticmethod(late)
    judge = OpenAIJudge(**settings("openai", url, concurrency=1, rubric=RUBRIC, timeout_s=0.2, retries=0))
    with pytest.raises(UserError, match="timed out"):
        list(judge.verdicts(PAIRS))
    assert judge.endpoint.spent == pytest.approx(ESTIMATE)


def test_too_many_threads_end_in_a_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(ThreadPoolExecutor, "submit", none_left)
    with pytest.raises(UserError, match=r"judge\.openai\.concurrency=4: .* Fix: set a smaller one"):
        list(OpenAIJudge(**settings("openai", url)).verdicts(PAIRS))


def test_half_a_surrogate_pair_in_an_answer_is_sent_as_a_question_mark(url: str) -> None:
    Server.reply = staticmethod(lambda _: (200, "Score: 3"))
    judge = OpenAIJudge(**settings("openai", url, rubric=RUBRIC))
    assert len(told(judge.verdicts([Pair("request 1", "\ud800")]))) == 1
    assert Server.asked[0]["messages"][0]["content"].startswith("request 1?x")


def test_what_reads_the_reply_may_fail_too(url: str) -> None:
    def failing(_: str) -> int:
        raise ZeroDivisionError

    Server.reply = staticmethod(lambda _: (200, "Score: 3"))
    with pytest.raises(UserError, match="ZeroDivisionError"):
        list(OpenAIJudge(**settings("openai", url)).endpoint.request_all(["a"], failing))


@pytest.mark.parametrize(
    "text", ["score (" + "a" * 100_000, "score(" * 50_000, "score" + " " * 100_000, "1 -" * 50_000]
)
def test_a_long_reply_is_searched_in_linear_time(text: str) -> None:
    start = time.monotonic()
    assert _score(text) is None
    assert time.monotonic() - start < 5
