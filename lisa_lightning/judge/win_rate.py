"""Which of two answers is the better one: AlpacaEval's question, asked of any OpenAI-compatible endpoint."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Final, final

from lisa_lightning.judge._endpoint import Endpoint
from lisa_lightning.judge.base import Metric, Pair, Verdict, quoted
from lisa_lightning.runtime.cache import digest
from lisa_lightning.runtime.errors import UserError

CODE: Final = 3  # raised when a change here can change a verdict
BETTER: Final = re.compile(r"better\W{0,3}:\W*([ab])\b", re.IGNORECASE)


@final
class WinRateJudge:
    """Flagged means that the model's answer is preferred to the reference (the row's own output).

    A stand-in for AlpacaEval, to be named as such: its own annotators and prompts decide the published win rates. The
    package alpaca_eval scores `alpaca_eval_final.json`. Which answer stands first is drawn by a hash of the pair, so
    that an annotator who prefers places gives one half.

    Args:
        rubric: the question, with places {prompt}, {first} and {second}; its reply must hold `Better: A` or `B`.
        endpoint: see `Endpoint`; the key comes from OPENAI_API_KEY alone.
    """

    metric: ClassVar[Metric] = "win_rate"

    def __init__(self, model: str, rubric: str, **endpoint: Any) -> None:
        if any(place not in rubric for place in ("{prompt}", "{first}", "{second}")):
            raise UserError("judge.win_rate.rubric must have the places {prompt}, {first} and {second}")
        self.rubric = rubric
        self.endpoint = Endpoint("win_rate", model, **endpoint)
        self.version = digest([CODE, rubric, self.endpoint.reply_settings])

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict | None]:
        """The score is 1 for a preferred answer and 0 for another; None where the asking failed."""
        texts = [self._text(p) for p in pairs]
        for pair, better in zip(pairs, self.endpoint.ask_all(texts, _better), strict=True):
            preferred = better == ("a" if _stands_first(pair) else "b")
            yield None if better is None else Verdict(preferred, float(preferred))

    def _text(self, pair: Pair) -> str:
        answers = (pair.response, pair.reference) if _stands_first(pair) else (pair.reference, pair.response)
        return quoted(self.rubric, prompt=pair.prompt, first=answers[0], second=answers[1])


def _stands_first(pair: Pair) -> bool:
    return int(digest(asdict(pair)), 16) % 2 == 0


def _better(reply: str) -> str | None:
    found = BETTER.findall(reply)
    return found[-1].lower() if found else None
