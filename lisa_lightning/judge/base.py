"""Interface of judges: `Judge` maps pairs of prompt and response to verdicts. `fill_rubric` quotes them for a model."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar, Final, Literal, Protocol, runtime_checkable

from lisa_lightning.runtime.cache import short_hash

Metric = Literal["harmful_score", "refusal_rate", "win_rate"]
TAG: Final = re.compile(r"<(/?)([^\W\d][\w.:-]*)([^<>]*)>")
"""A tag. Its groups are slash, name and attributes."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Input of a judge: the user's request without a template, and a model's answer."""

    prompt: str
    response: str
    reference: str = ""
    """Answer to compare with; "" for judges that compare nothing."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verdict of one judge on one answer."""

    flagged: bool
    """True if the judge's metric counts the answer: as harmful, as not refused, or as preferred."""
    score: float
    """Degree from 0 to 1 to which the metric counts the answer; never NaN."""
    refused: bool | None = None
    """True if the answer refuses; None if the judge does not detect refusals. Counted for the metric `refusal_rate`."""
    categories: Mapping[str, bool] = field(default_factory=dict)
    """Name of every kind of harm that the judge distinguishes -> True if the answer is flagged for it."""
    partly: bool | None = None
    """True if the judge saw only a part of the answer; None if its input has no limit."""


class Judge(Protocol):
    """Interface of a judge: one small final class per file.

    The constructor's arguments are the keys of conf/judge/NAME.yaml. It runs before hours of training, so it raises
    `UserError` for every problem that shows without loading a model: a missing key, or missing weights. It downloads
    weights. They are loaded at the first verdict.

    A judge whose scores are grades declares `graded: ClassVar[bool] = True`. The metric `max_severity` then counts
    answers with the highest grade.
    """

    metric: ClassVar[Metric]
    """Metric name of the share of flagged answers to harmful requests; for win_rate, of flagged task answers."""

    @property
    def version(self) -> str:
        """Text that changes with everything that can change a verdict.

        No answer is judged twice by the same judge and version.
        """
        ...

    def verdicts(self, pairs: Sequence[Pair]) -> Iterator[Verdict | None]:
        """Yield one verdict per pair, in order.

        Each verdict is yielded as soon as it is known, so that an interrupt loses none.

        Args:
            pairs: requests with their answers.

        Yields:
            A verdict, or None for a pair that failed. Verdicts that are known already follow a None, then the error.
        """
        ...


@runtime_checkable
class Documented(Protocol):
    """A fitted judge, with a card that describes its training rows and its quality."""

    def card(self) -> dict[str, str]:
        """Return the files that accompany its verdicts: name -> text."""
        ...


def fill_template(text: str, **values: str) -> str:
    """Return `text` with its {placeholders} replaced; braces in the values have no effect.

    Args:
        text: a text with placeholders. Placeholders without a value remain.
        values: placeholder name -> text.
    """
    return re.sub(r"\{(\w+)\}", lambda placeholder: values.get(placeholder[1], placeholder[0]), text)


def fill_rubric(rubric: str, **values: str) -> str:
    """Return the filled rubric, in which no value can open or close the tags that quote it.

    If a value contains something like a tag around a {placeholder}, all these tags get a suffix that occurs in no
    value: `<answer>` becomes `<answer-3f9a1c2b>`. Other rubrics are filled unchanged.

    Args:
        rubric: the question, with tags such as `<answer>{response}</answer>`.
        values: placeholder name -> text.
    """
    names = _quoting_tags(rubric, values)
    any_name = "|".join(re.escape(_plain(name)) for name in sorted(names))
    # A letter after the name makes it another name. Blanks, slashes of any kind, digits and signs do not.
    alike = re.compile(rf"<[\s/\\⁄∕]*(?:{any_name})(?![^\W\d_])")
    text = _plain(fill_template(rubric, **values))
    if names and len(alike.findall(text)) > len(alike.findall(_plain(rubric))):
        # A clash needs an answer that contains its own hash. Then the next number is tried.
        suffixes = (short_hash([number, text])[:8] for number in count())
        suffix = next(suffix for suffix in suffixes if suffix not in text)
        rubric = TAG.sub(lambda t: f"<{t[1]}{t[2]}-{suffix}{t[3]}>" if t[2].lower() in names else t[0], rubric)
    return fill_template(rubric, **values)


def _quoting_tags(rubric: str, values: Mapping[str, str]) -> set[str]:
    """Return the names of tags that open before a {placeholder} or close after it."""
    names: set[str] = set()
    for match in re.finditer(r"\{(\w+)\}", rubric):
        if match[1] in values:
            names |= _unmatched(rubric[: match.start()], "") | _unmatched(rubric[match.end() :], "/")
    return names


def _unmatched(text: str, slash: str) -> set[str]:
    """Return the names of opening tags (closing ones for slash "/") that outnumber their counterparts in `text`."""
    balance: dict[str, int] = {}
    for tag in TAG.finditer(text):
        if not tag[3].endswith("/"):
            name = tag[2].lower()
            balance[name] = balance.get(name, 0) + (1 if tag[1] == slash else -1)
    return {name for name, surplus in balance.items() if surplus > 0}


def _plain(text: str) -> str:
    """Return `text` in lower case, without invisible characters and accents, and with wide characters made plain."""
    plain = unicodedata.normalize("NFKD", text).lower()
    # Unlike in normal_form, accents are removed too: a tag that looks alike must count as the tag.
    removed = {"Cc", "Cf", "Cs", "Mn"}
    return "".join(char for char in plain if char.isspace() or unicodedata.category(char) not in removed)
