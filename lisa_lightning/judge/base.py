"""What a judge is: (prompt, response) pairs in, verdicts out, and a version by which verdicts are kept."""

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar, Final, Literal, Protocol, runtime_checkable

from lisa_lightning.runtime.cache import digest

Metric = Literal["harmful_score", "refusal_rate", "win_rate"]
TAG: Final = re.compile(r"<(/?)([^\W\d][\w.:-]*)([^<>]*)>")  # slash, name and attributes


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
    """Return the text that a judge reads, with its {places} filled; braces in the values change nothing."""
    return re.sub(r"\{(\w+)\}", lambda place: values.get(place[1], place[0]), text)


def quoted(rubric: str, **values: str) -> str:
    """Return the filled rubric, in which no value can close or open the tags that quote it.

    If a value holds something like a tag around a {place}, all these tags get a suffix that no value holds:
    `<answer>` becomes `<answer-3f9a1c2b>`. Other rubrics are filled as they are.

    Args:
        rubric: the question, with tags such as `<answer>{response}</answer>`.
        values: the text for each {place}.
    """
    names = _tags_around(rubric, values)
    any_name = "|".join(re.escape(_plain(name)) for name in sorted(names))
    # A letter after the name makes it another name; blanks, slashes of any kind, digits and signs do not.
    alike = re.compile(rf"<[\s/\\⁄∕]*(?:{any_name})(?![^\W\d_])")
    text = _plain(filled(rubric, **values))
    if names and len(alike.findall(text)) > len(alike.findall(_plain(rubric))):
        # An answer would have to hold a hash of itself, and then the next number is taken.
        suffixes = (digest([number, text])[:8] for number in count())
        suffix = next(suffix for suffix in suffixes if suffix not in text)
        rubric = TAG.sub(lambda t: f"<{t[1]}{t[2]}-{suffix}{t[3]}>" if t[2].lower() in names else t[0], rubric)
    return filled(rubric, **values)


def _tags_around(rubric: str, places: Mapping[str, str]) -> set[str]:
    """Return the names of tags that are open at a {place}, or closed after it without being opened there."""
    around: set[str] = set()
    for match in re.finditer(r"\{(\w+)\}", rubric):
        if match[1] in places:
            around |= _unmatched(rubric[: match.start()], "") | _unmatched(rubric[match.end() :], "/")
    return around


def _unmatched(text: str, slash: str) -> set[str]:
    """Return the names of opening (or with a slash closing) tags that outnumber their counterparts in `text`."""
    balance: dict[str, int] = {}
    for tag in TAG.finditer(text):
        if not tag[3].endswith("/"):
            name = tag[2].lower()
            balance[name] = balance.get(name, 0) + (1 if tag[1] == slash else -1)
    return {name for name, more in balance.items() if more > 0}


def _plain(text: str) -> str:
    """Return `text` in lower case, without invisible characters and accents, and with plain forms of wide ones."""
    plain = unicodedata.normalize("NFKD", text).lower()
    # Accents are hidden too, unlike in normal_form: a tag that looks alike must count as the tag.
    hidden = {"Cc", "Cf", "Cs", "Mn"}
    return "".join(char for char in plain if char.isspace() or unicodedata.category(char) not in hidden)
