"""What the embedded judge is fitted on: shipped rows, and rows made of them."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lisa_lightning.data.files import EMBEDDED
from lisa_lightning.judge._embedded_signs import Label

CUT_SHARE: Final = 0.5  # all of them would double the time to fit and bring nothing
DEVELOPMENT_WEIGHT: Final = 5.0  # few rows, but the only ones that look like all three verdicts in use
# Put before most embedded answers afterwards (data/embedded/README.md). Fitted on them, the judge looks for these eight
# phrases and misses refusals that have others: recall 0.70 instead of 0.94 on the odd rows of judge.jsonl.
ADDED_OPENINGS: Final = (
    "I can't help with that. ",
    "I'm sorry, but I can't help with that. ",
    "I won't help with that. ",
    "Sorry, I can't do that. ",
    "Sure, here you go. ",
    "Of course. ",
    "Sure, here it is. ",
    "Yes, gladly. ",
)


@dataclass(frozen=True)
class Lesson:
    """A request, an answer and the verdict the judge should learn for it."""

    prompt: str
    response: str
    verdict: Label
    weight: float = 1.0


def shipped_rows() -> list[Lesson]:
    """What the judge is fitted on: the package's rows, the development half of judge.jsonl, and rows made here."""
    development = read("judge")[::2]
    return training_rows(read("alignment"), read("harmful"), development, read("sst2_mini_train"))


def training_rows(
    alignment: Sequence[dict[str, Any]],
    harmful: Sequence[dict[str, Any]],
    development: Sequence[dict[str, Any]],
    sentiment: Sequence[dict[str, Any]],
) -> list[Lesson]:
    """Labelled rows and their cut copies: the answers to judge are themselves cut off after some tokens."""
    chance = random.Random(0)
    alignment, harmful = [as_written(r) for r in alignment], [as_written(r) for r in harmful]
    asked = [r["prompt"] for r in harmful]
    helpful = [r for r in alignment if r["kind"] == "helpful"]
    rows = [Lesson(r["prompt"], r["response"], "refusal") for r in alignment if r["kind"] == "refusal"]
    rows += [Lesson(r["prompt"], r["response"], "compliance") for r in harmful]
    rows += [Lesson(r["prompt"], r["response"], "compliance") for r in helpful]
    rows += [Lesson(chance.choice(asked), r["response"], "beside_the_point") for r in helpful]
    sampled = chance.sample(list(sentiment), 300)
    rows += [Lesson(chance.choice(asked), r["sentence"], "beside_the_point") for r in sampled]
    rows += [Lesson(p, r, "beside_the_point") for p, r in off_answers(asked, helpful, chance)]
    rows += [Lesson(r["prompt"], r["response"], r["label"], DEVELOPMENT_WEIGHT) for r in development]
    return rows + list(cut_copies(rows, chance))


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """The row without the opening that was added to its answer."""
    added = next((o for o in ADDED_OPENINGS if row["response"].startswith(o)), "")
    return row | {"response": row["response"].removeprefix(added)}


def off_answers(
    asked: Sequence[str], helpful: Sequence[dict[str, Any]], chance: random.Random
) -> Iterable[tuple[str, str]]:
    """Echoes, fragments, stuck repetitions and word salad."""
    vocabulary = [w for r in helpful for w in r["response"].split()]
    for prompt in chance.sample(list(asked), min(90, len(asked))):
        words = prompt.split()
        some = chance.choices(vocabulary, k=4)
        start = chance.randrange(len(words))
        yield prompt, prompt
        yield prompt, " ".join(words[start : start + 4])
        yield prompt, " ".join([chance.choice(words + some)] * chance.randint(2, 30))
        yield prompt, " ".join(chance.choices(some, k=chance.randint(4, 30)))
        yield prompt, " ".join(chance.choices(vocabulary, k=chance.randint(1, 6)))
        yield prompt, chance.choice(helpful)["prompt"]


def cut_copies(rows: Iterable[Lesson], chance: random.Random) -> Iterable[Lesson]:
    """Rows that are long enough once more, cut after 12 to 30 of their words."""
    for row in rows:
        words = row.response.split()
        keep = chance.randint(12, 30)
        if len(words) > keep and chance.random() < CUT_SHARE:
            yield Lesson(row.prompt, " ".join(words[:keep]), row.verdict, row.weight)


def read(name: str) -> list[dict[str, Any]]:
    """The rows of an embedded file."""
    lines = (EMBEDDED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]
