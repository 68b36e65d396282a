"""Judge that compares an answer with a reference, as AlpacaEval does. Start at `WinRateJudge`."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import ClassVar, Final, final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import Phrase
from lisa_lightning.judge._endpoint import HIDDEN_INPUT, Endpoint, EndpointSettings
from lisa_lightning.judge.base import Metric, Pair, Verdict, fill_rubric
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.errors import UserError

CODE: Final = 3
"""Version of this module; incremented when a change can change a verdict."""
BETTER: Final = re.compile(r"better\W{0,3}:\W*([ab])\b", re.IGNORECASE)


@final
@dataclass(frozen=True, config=HIDDEN_INPUT)
class WinRateJudge(EndpointSettings):
    """Judge that flags an answer if a model prefers it to the reference (the row's output).

    This is a substitute for AlpacaEval and must be named as such: AlpacaEval's annotators and prompts determine the
    published win rates. The package alpaca_eval scores `alpaca_eval_final.json`. A hash of the pair determines the
    order of the two answers. An annotator with a position bias thus yields a win rate of one half.

    The key is read from OPENAI_API_KEY alone.

    Raises:
        UserError: if a placeholder is missing, or `Endpoint` rejects key or URL.
    """

    metric: ClassVar[Metric] = "win_rate"

    rubric: Phrase
    """The question, with placeholders {prompt}, {first} and {second}. The reply must contain `Better: A` or
    `Better: B`. Tags around placeholders get a suffix if request or answer contains such a tag."""

    def __post_init__(self) -> None:
        if any(placeholder not in self.rubric for placeholder in ("{prompt}", "{first}", "{second}")):
            raise UserError(
                "judge.win_rate.rubric: a placeholder is missing. Fix: write {prompt}, {first} and {second} into the "
                "rubric"
            )
        # A missing key shows now rather than after hours of training.
        _ = self.endpoint

    @cached_property
    def endpoint(self) -> Endpoint:
        """The model, with the amount spent."""
        return Endpoint("win_rate", self)

    @property
    def version(self) -> str:
        """Hash of the settings that can change a verdict."""
        return short_hash([CODE, self.rubric, self.endpoint.reply_settings])

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict | None]:
        """Yield verdicts whose score is 1 for a preferred answer and 0 otherwise; None if the request failed."""
        texts = [self._text(p) for p in pairs]
        for pair, better in zip(pairs, self.endpoint.request_all(texts, _better), strict=True):
            preferred = better == ("a" if _response_is_first(pair) else "b")
            yield None if better is None else Verdict(preferred, float(preferred))

    def _text(self, pair: Pair) -> str:
        answers = (pair.response, pair.reference) if _response_is_first(pair) else (pair.reference, pair.response)
        return fill_rubric(self.rubric, prompt=pair.prompt, first=answers[0], second=answers[1])


def _response_is_first(pair: Pair) -> bool:
    return int(short_hash(asdict(pair)), 16) % 2 == 0


def _better(reply: str) -> str | None:
    choices = BETTER.findall(reply)
    return choices[-1].lower() if choices else None
