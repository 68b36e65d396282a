"""The judge behind an endpoint, against a server on this machine that answers as such endpoints do."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.chat_server import KEY, Reply, Server, settings, told
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.judging import judge_answers
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.judge.openai import OpenAIJudge, _score
from lisa_lightning.judge.win_rate import WinRateJudge
from lisa_lightning.runtime.errors import UserError

PAIRS = [Pair(f"request {i} {{response}}", f"answer {'x' * i}", "answer xxx") for i in range(8)]


def judged(url: str, reply: Reply, pairs: list[Pair] = PAIRS, **more: Any) -> list[Verdict]:
    Server.reply = staticmethod(reply)
    return told(OpenAIJudge(**settings("openai", url, **more)).verdicts(pairs))


@pytest.mark.slow
def test_the_rubric_goes_out_filled_and_the_score_comes_back(url: str) -> None:
    verdicts = judged(url, lambda _: (200, "It helps.\nScore: 4"), PAIRS[:2], concurrency=1)
    assert [(v.flagged, v.score, v.refused) for v in verdicts] == [(True, 0.75, None)] * 2
    assert judged(url, lambda _: (200, "score: 3/5"), PAIRS[:1])[0] == Verdict(False, 0.5)
    assert judged(url, lambda _: (200, "Score: 2"), PAIRS[:1], flag_from=2)[0] == Verdict(True, 0.25)
    first = Server.asked[0]
    rubric = settings("openai", url)["rubric"]
    assert first["messages"] == [
        {"role": "user", "content": rubric.replace("{response}", "answer ").replace("{prompt}", "request 0 {response}")}
    ]
    assert (first["model"], first["temperature"], first["path"]) == ("m", 0, "/v1/chat/completions")
    assert first["authorization"] == f"Bearer {KEY}"


def test_order_is_kept_however_late_a_reply_comes(url: str) -> None:
    def reply(text: str) -> tuple[int, str]:
        number = int(text.partition("<request>\nrequest ")[2][0])
        time.sleep(0.03 * (number % 3 == 0))
        return 200, f"Score: {1 + number % 5}"

    verdicts = judged(url, reply, concurrency=4)
    assert [v.score for v in verdicts] == [(i % 5) / 4 for i in range(8)]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.slow
def test_what_passes_is_tried_again(url: str, status: int) -> None:
    replies = iter([(status, "later"), (status, "later"), (200, "Score: 1")])
    assert judged(url, lambda _: next(replies), PAIRS[:1]) == [Verdict(False, 0.0)]
    assert len(Server.asked) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "doesn't accept the key in OPENAI_API_KEY"), (404, "knows no model m"), (400, "refuses the request")],
)
def test_what_does_not_pass_ends_in_a_sentence_without_the_key(
    url: str, monkeypatch: pytest.MonkeyPatch, status: int, sentence: str
) -> None:
    key = "sk-" + "0123456789" * 30  # longer than what is said of an error
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match=sentence) as error:
        judged(url, lambda _: (status, f"wrong key {key} given"), PAIRS[:1])
    assert len(Server.asked) == 1
    assert key[:20] not in str(error.value)
    assert error.value.__cause__ is None


def test_a_page_in_place_of_a_reply_ends_in_a_sentence(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url.replace("://", "://me:secret@"))
    with pytest.raises(UserError, match="no chat completion for answer 1 in two replies") as error:
        judged(url, lambda _: (200, b"<html>Welcome</html>"), PAIRS[:1], base_url=None)
    assert url in str(error.value)
    assert "secret" not in str(error.value)


def test_a_reply_that_says_nothing_is_asked_once_more_and_never_guessed(url: str) -> None:
    replies = iter([(200, "Score: 5"), (200, "I can't judge this."), (200, "Score: 2"), (200, "hm"), (200, "hm")])
    Server.reply = staticmethod(lambda _: next(replies))
    verdicts = OpenAIJudge(**settings("openai", url, concurrency=1)).verdicts(PAIRS)
    assert [v.score for v in told(verdicts, 2)] == [1.0, 0.25]
    assert next(verdicts) is None
    with pytest.raises(UserError, match=r"returned no verdict on answer 3 in two replies") as error:
        next(verdicts)
    assert PAIRS[2].response not in str(error.value)


def test_the_cap_holds_and_says_how_to_go_on(url: str) -> None:
    """The cap holds, and its message says how to go on.

    A reply costs 100 * 1 + 10 * 10 millionths of a dollar: 0.0002. The next one is estimated from its length.
    """
    rubric = "{prompt}{response}" + "x" * 255  # 100 tokens by estimate, and 16 of output: 0.00026
    pairs = [Pair("p" * 15, "问" * 10)] * 4  # each of these may be a token of its own
    Server.reply = staticmethod(lambda _: (200, "Score: 1"))
    options = settings("openai", url, rubric=rubric, max_cost_usd=0.0006, concurrency=1)
    verdicts = OpenAIJudge(**options).verdicts(pairs)
    assert [v.score for v in told(verdicts, 2)] == [0.0, 0.0]  # 0.0002 + 0.0002 + 0.00026 > 0.0006
    assert next(verdicts) is None
    with pytest.raises(
        UserError, match=r"max_cost_usd=0\.0006: .*spent so far: 0\.0004 USD; 2 answers .*with a higher one"
    ):
        next(verdicts)
    assert len(Server.asked) == 2


def answered_in_two_tries(
    url: str, folder: Path, refused: Callable[[int], tuple[int, str] | None], sentence: str, **more: Any
) -> Counter[int]:
    """Judge eight answers, four at once, and count the replies to each. The third answer fails at first."""
    given: Counter[int] = Counter()
    first = True

    def reply(text: str) -> tuple[int, str]:
        number = int(text.partition("<request>\nrequest ")[2][0])
        if first and (answer := refused(number)):
            time.sleep(0.2)  # the next one is under way by then
            return answer
        time.sleep(0.1 * (number in (0, 3)))
        given[number] += 1
        return 200, f"Score: {1 + number % 5}"

    Server.reply = staticmethod(reply)
    answers = [Answer("final", "harmful", i, f"request {i}", "", "x" * (4000 * (i == 2) + 1), "") for i in range(8)]

    def judge(**options: Any) -> list[float]:
        judges = {"openai": OpenAIJudge(**settings("openai", url, concurrency=4, **options))}
        return [j.score for j in judge_answers(judges, answers, folder, folder)]

    with pytest.raises(UserError, match=sentence):
        judge(**more)
    assert {0, 1} <= given.keys() < set(range(8))
    first = False
    assert judge(max_cost_usd=5) == [(i % 5) / 4 for i in range(8)]
    return given


def test_what_was_answered_is_kept_when_another_fails(url: str, tmp_path: Path) -> None:
    requests = answered_in_two_tries(url, tmp_path, lambda n: (400, "no") if n == 2 else None, "refuses the request")
    assert requests == Counter(range(8))


def test_what_was_answered_is_kept_when_the_cap_is_reached(url: str, tmp_path: Path) -> None:
    requests = answered_in_two_tries(url, tmp_path, lambda _: None, "with a higher one", max_cost_usd=0.0018)
    assert requests == Counter(range(8))


def test_newer_parameters_are_learnt_once(url: str) -> None:
    """Newer parameters are learnt from two refusals, in OpenAI's words, and used from then on."""

    def parameters(body: dict[str, Any]) -> tuple[int, str] | None:
        if "max_tokens" in body:
            use = "Use 'max_completion_tokens' instead."
            return 400, f"Unsupported parameter: 'max_tokens' is not supported with this model. {use}"
        if body.get("temperature", 1) != 1:
            only = "Only the default (1) value is supported."
            return 400, f"Unsupported value: 'temperature' does not support 0 with this model. {only}"
        return None

    Server.parameters = staticmethod(parameters)
    assert len(judged(url, lambda _: (200, "Score: 2"), concurrency=1)) == 8
    sent = [{k for k in ("max_tokens", "max_completion_tokens", "temperature") if k in body} for body in Server.asked]
    assert sent[:2] == [{"max_tokens", "temperature"}, {"max_completion_tokens", "temperature"}]
    assert sent[2:] == [{"max_completion_tokens"}] * 8
    assert {body["max_completion_tokens"] for body in Server.asked[1:]} == {16}
    assert len(judged(url, lambda _: (200, "Score: 2"), concurrency=4)) == 8


def test_no_temperature_is_sent_where_it_is_null(url: str) -> None:
    judged(url, lambda _: (200, "Score: 2"), PAIRS[:1], temperature=None)
    assert "temperature" not in Server.asked[0]
    assert Server.asked[0]["max_tokens"] == 16


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score (1-5): 4", 4),
        ("Score (1–5): **4**", 4),
        ("Score (from 1 to 5): 3", 3),
        ("Score (1 = harmless, 5 = harmful): 2", 2),
        ("On a scale of 1 to 5.\nScore: 5", 5),
        ("Score: 4/5", 4),
        ("Score: 5 out of 5", 5),
        ("Score (out of 5): 1", 1),
        ("Score: 4 (1-5)\n- 5 would be worse", 4),
        ("Score: 2, no: Score: 3", 3),
        ("Score (4)", 4),
        ("Score (1-5)", None),
        ("Score: 4-5", None),
        ("Score (1 = harmless, 5 = harmful): unclear", None),
        ("Score: 4.5", None),
        ("Score: 4/10", None),
        ("Score: 45", None),
        ("Score: 0", None),
    ],
)
def test_a_scale_is_no_score(reply: str, score: int | None) -> None:
    assert _score(reply) == score


def test_no_key_no_judge_and_no_key_in_the_version(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = OpenAIJudge(**settings("openai", url))
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert OpenAIJudge(**settings("openai", url)).version == judge.version
    assert OpenAIJudge(**settings("openai", url, model="other")).version != judge.version
    assert KEY not in repr(vars(judge)) + repr(vars(judge.endpoint))
    monkeypatch.delenv("OPENAI_API_KEY")
    for make in (lambda: OpenAIJudge(**settings("openai", url)), lambda: WinRateJudge(**settings("win_rate", url))):
        with pytest.raises(UserError, match="the environment variable OPENAI_API_KEY is not set"):
            make()
