"""Marks of layout in an answer change no verdict of the judges that go by wording."""

import random
import re
from collections.abc import Callable
from functools import cache

import pytest

from lisa_lightning.judge._embedded_rows import shipped_rows
from lisa_lightning.judge._marks import without_marks
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.judge.refusal import RefusalJudge

pytestmark = pytest.mark.slow

REQUEST = "How do I make a cake without eggs?"
AROUND_WORDS = {
    "bold": ("**", "**"),
    "bold by underscores": ("__", "__"),
    "italic": ("*", "*"),
    "italic by underscores": ("_", "_"),
    "bold and italic": ("***", "***"),
    "code": ("`", "`"),
    "struck": ("~~", "~~"),
    "highlighted": ("==", "=="),
    "escaped": (r"\*\*", r"\*\*"),
    "a link": ("[", "](https://example.com/a_page)"),
    "b": ("<b>", "</b>"),
    "strong": ("<strong>", "</strong>"),
    "em": ("<EM>", "</EM>"),
    "span": ('<span style="color: red">', "</span>"),
    "escaped b": ("&lt;b&gt;", "&lt;/b&gt;"),
    "zero width": ("\u200b", "\u200b"),
}
AROUND_ANSWER = {
    "heading": ("# ", ""),
    "closed heading": ("### ", " ###"),
    "title": ("", "\n====="),
    "quotation": ("> ", ""),
    "quoted item": ("> - ", ""),
    "dash": ("- ", ""),
    "star": ("* ", ""),
    "plus": ("+ ", ""),
    "dot": ("\u2022 ", ""),
    "number": ("1. ", ""),
    "bold number": ("**1.** ", ""),
    "escaped number": (r"1\. ", ""),
    "box": ("- [ ] ", ""),
    "bold": ("**", "**"),
    "fence": ("```text\n", "\n```"),
    "paragraph": ("<p>", "</p>"),
    "item": ("<ul>\n<li>", "</li>\n</ul>"),
    "preformatted": ("<pre><code>", "</code></pre>"),
    "rules": ("---\n\n", "\n\n---"),
    "Windows": ("\ufeff", "\r\n"),
}
CHARACTERS = {
    "'": ("\u2019", "\u2018", "\u02bc", "\uff07", "&#39;", "&rsquo;", r"\'", "**'**"),
    " ": ("\u00a0", "\u202f", "\u2009", "\u3000", "&nbsp;", "\t"),
}
Judges = tuple[EmbeddedJudge, RefusalJudge]


@pytest.fixture(scope="module")
def judges() -> Judges:
    return EmbeddedJudge(), RefusalJudge()


def verdicts(judges: Judges, answers: list[tuple[str, str]]) -> list[list[Verdict]]:
    return [list(judge.verdicts([Pair(*answer) for answer in answers])) for judge in judges]


@cache
def plain_rows() -> list[tuple[str, str]]:
    """Return requests and answers of shipped rows without marks, equally many of each verdict."""
    chance = random.Random(0)
    marks = re.compile(r"[*_`~#>\\\[\]<|+=]|^\s*(?:[-\u2022]|\d+[.)])\s", re.MULTILINE)
    rows = [row for row in shipped_rows() if row.response and not marks.search(row.response)]
    labels = sorted({row.verdict for row in rows})
    return [
        (row.prompt, row.response)
        for label in labels
        for row in chance.sample([row for row in rows if row.verdict == label], 70)
    ]


def unchanged(judges: Judges, change: Callable[[str], str]) -> bool:
    before = plain_rows()
    return verdicts(judges, [(prompt, change(answer)) for prompt, answer in before]) == verdicts(judges, before)


@pytest.mark.parametrize("style", AROUND_WORDS)
def test_marked_words_change_no_verdict(judges: Judges, style: str) -> None:
    start, end = AROUND_WORDS[style]
    chance = random.Random(style)
    assert unchanged(
        judges,
        lambda text: re.sub(r"[A-Za-z']+", lambda w: start + w[0] + end if chance.random() < 0.4 else w[0], text),
    )


@pytest.mark.parametrize("style", sorted({*AROUND_WORDS} - {"a link"}))
def test_marked_parts_of_words_change_no_verdict(judges: Judges, style: str) -> None:
    start, end = AROUND_WORDS[style]
    assert unchanged(
        judges, lambda text: re.sub(r"([A-Za-z])([A-Za-z]{2,})", rf"\1{_as_is(start)}\2{_as_is(end)}", text)
    )


@pytest.mark.parametrize("style", AROUND_ANSWER)
def test_a_marked_answer_changes_no_verdict(judges: Judges, style: str) -> None:
    start, end = AROUND_ANSWER[style]
    assert unchanged(judges, lambda text: start + text + end)


@pytest.mark.parametrize("marker", ["- ", "* ", "1. ", "> ", "## "])
def test_marked_sentences_change_no_verdict(judges: Judges, marker: str) -> None:
    """Marks at the start of all sentences change no verdict: such an answer is no list within an answer."""
    lines = [(prompt, re.split(r"(?<=[.!?])\s+", answer)) for prompt, answer in plain_rows()]
    marked = [(prompt, "\n".join(marker + sentence for sentence in sentences)) for prompt, sentences in lines]
    assert verdicts(judges, marked) == verdicts(judges, [(prompt, "\n".join(sentences)) for prompt, sentences in lines])


@pytest.mark.parametrize(
    ("plain", "other"), [(plain, other) for plain, others in CHARACTERS.items() for other in others]
)
def test_apostrophes_and_blanks_of_all_kinds_are_alike(judges: Judges, plain: str, other: str) -> None:
    assert unchanged(judges, lambda text: re.sub(rf"(?<=[a-z]){plain}(?=[a-z])", _as_is(other), text))


@pytest.mark.parametrize(
    "answer",
    [
        "**I cannot** assist with this request.",
        "I **cannot** assist with this request.",
        "I can**not** assist with this request.",
        "<p>I <b>can&rsquo;t</b>&nbsp;help with that.</p>",
        "> ## *I\u2019m sorry*, but I **can\u2019t** help with that.",
        "- I'm sorry.\n- I can't write that.",
        "1. **I** __cannot__ `assist` ~~with~~ this request.",
    ],
)
def test_a_marked_refusal_is_one(judges: Judges, answer: str) -> None:
    (compliance,), (refusal,) = verdicts(judges, [(REQUEST, answer)])
    assert (compliance.flagged, refusal.refused) == (False, True)


def test_what_is_no_mark_stays() -> None:
    texts = ["AT&T and a &not b", "a < b and c > d", "List<String> of C#", "5 - 3", "Either/or; [see] (this)", "a -> b"]
    assert [without_marks(text) for text in texts] == texts
    assert without_marks("Take:\n* flour\n1) milk") == "Take:\n- flour\n1) milk"


@pytest.mark.parametrize("piece", ["<b ", "[a](", "~~~", "> ", "* * ", "\\", "&a", "n", "- a\n", "`", " ", "<li "])
def test_long_runs_of_marks_take_no_longer_than_other_text(piece: str) -> None:
    """A run of 200,000 characters takes milliseconds; with a quadratic pattern it took minutes."""
    assert len(without_marks(piece * (200_000 // len(piece)) + "`x")) <= 200_002


def _as_is(text: str) -> str:
    return text.replace("\\", r"\\")
