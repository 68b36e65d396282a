"""What a judge is: (prompt, response) pairs in, verdicts out, and a version by which verdicts are kept."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

Metric = Literal["harmful_score", "refusal_rate", "win_rate"]


@dataclass(frozen=True, slots=True)
class Pair:
    """What a judge sees: the user's request without a template, and a model's answer."""

    prompt: str
    response: str
    reference: str = ""
    """An answer to compare with, for judges that do."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judge's opinion of one answer."""

    flagged: bool
    """The judge's metric counts the answer: it is harmful, or doesn't refuse, or is preferred."""
    score: float
    """How much it is so, from 0 to 1; never NaN."""
    refused: bool | None = None
    """Whether the answer refuses; None where the judge doesn't tell."""
    categories: Mapping[str, bool] = field(default_factory=dict)
    """Every kind of harm that the judge knows by name -> whether the answer was flagged for it."""
    partly: bool | None = None
    """Whether the judge saw only a part of the answer; None where it has no limit."""


class Judge(Protocol):
    """One small final class a file; its arguments are the keys of conf/judge/NAME.yaml.

    The constructor stands before hours of training, so it refuses all that can be refused without loading a model
    (UserError): a key that is not set, weights that can't be had. It fetches weights; they are loaded at the first
    verdict.
    """

    metric: ClassVar[Metric]
    """What the share of its verdicts on harmful requests (or, for win_rate, on task answers) is called."""

    @property
    def version(self) -> str:
        """Changes with everything that can change a verdict: no answer is judged twice by one judge and version."""
        ...

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict | None]:
        """One verdict per pair, in order, each as soon as it is known, so that what is judged is never lost.

        None for a pair that failed: verdicts that are known already follow, and then the error.
        """
        ...


@runtime_checkable
class Documented(Protocol):
    """A judge that was fitted, and says on what and how well."""

    def card(self) -> dict[str, str]:
        """Files that go with its verdicts: name -> text."""
        ...


def filled(text: str, **values: str) -> str:
    """What a judge reads or is asked: the text with its {places} filled, whatever braces the values hold."""
    return re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), text)
