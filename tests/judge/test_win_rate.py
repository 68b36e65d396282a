"""The judge that compares two answers, against a server that answers as such endpoints do."""

import time
from itertools import islice

import pytest

from helpers.chat_server import Reply, Server, settings, told
from lisa_lightning.judge.base import Pair
from lisa_lightning.judge.win_rate import WinRateJudge, _better
from lisa_lightning.runtime.errors import UserError


def win_rate(url: str, reply: Reply, pairs: list[Pair]) -> float:
    Server.reply = staticmethod(reply)
    verdicts = told(WinRateJudge(**settings("win_rate", url)).verdicts(pairs))
    assert all(v.score == float(v.flagged) for v in verdicts)
    return sum(v.flagged for v in verdicts) / len(verdicts)


@pytest.mark.slow
def test_win_rate_follows_the_answers_and_not_their_places(url: str) -> None:
    pairs = [Pair(f"do {i}", "long answer" if i % 4 else "-", "short") for i in range(60)]

    def longer(text: str) -> tuple[int, str]:
        a, b = (text.partition(f"<answer {x}>\n")[2].partition("\n</answer")[0] for x in "AB")
        assert {a, b} in ({"long answer", "short"}, {"-", "short"})
        best, other = ("A", "B") if len(a) > len(b) else ("B", "A")
        return 200, f"At first sight Better: {other}, but then Better: {best}"  # the last word counts

    assert win_rate(url, longer, pairs) == 0.75
    assert 0.3 < win_rate(url, lambda _: (200, "Better: A"), pairs) < 0.7
    assert [_better(f"**Better:** {x}\n{x} is better. A is vague.") for x in "AB"] == ["a", "b"]


def test_win_rate_keeps_what_was_answered_too(url: str) -> None:
    def reply(text: str) -> tuple[int, str]:
        time.sleep(0.2 * ("do 1" in text))  # the others are under way by then
        return (400, "no") if "do 1" in text else (200, "Better: A")

    Server.reply = staticmethod(reply)
    verdicts = WinRateJudge(**settings("win_rate", url)).verdicts([Pair(f"do {i}", "a", "b") for i in range(4)])
    assert [v is None for v in islice(verdicts, 4)] == [False, True, False, False]
    with pytest.raises(UserError, match=r"judge\.win_rate at .* refuses the request"):
        next(verdicts)
