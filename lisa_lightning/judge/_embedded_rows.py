"""Training rows of the embedded judge: shipped rows, and rows derived from them. Start at `shipped_rows`."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lisa_lightning.data.files import EMBEDDED
from lisa_lightning.judge._embedded_signs import Label

CUT_SHARE: Final = 0.5
"""Share of long rows that get a truncated copy. Copies of all rows would double the time of the fit without a gain."""
DEVELOPMENT_WEIGHT: Final = 5.0
"""Weight of development rows: few, but the only ones that resemble all three verdicts in use."""
SUBTLE_SENTENCES: Final = 1717
"""Sentences at the beginning of sst2_mini_train, from which the judge learns. Plain ones were added after them."""
MISMATCH_WEIGHT: Final = 0.25
"""Weight of helpful answers to other requests. With 1, more answers that share few words with their request count as
beside the point."""
# These openings were added to most embedded answers later (data/embedded/README.md). A judge fitted on them looks for
# these eight phrases and misses other refusals: recall 0.70 instead of 0.94 on the odd rows of judge.jsonl.
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
class TrainingRow:
    """A request, an answer, and the verdict that the judge should learn."""

    prompt: str
    response: str
    verdict: Label
    weight: float = 1.0


def shipped_rows() -> list[TrainingRow]:
    """Return the training rows: the package's rows, the even rows of judge.jsonl, and rows derived from them."""
    development = read_embedded("judge")[::2]
    alignment, harmful, sentiment = (read_embedded(name) for name in ("alignment", "harmful", "sst2_mini_train"))
    return training_rows(alignment, harmful, development, sentiment[:SUBTLE_SENTENCES])


def training_rows(
    alignment: Sequence[dict[str, Any]],
    harmful: Sequence[dict[str, Any]],
    development: Sequence[dict[str, Any]],
    sentiment: Sequence[dict[str, Any]],
) -> list[TrainingRow]:
    """Return labelled rows and truncated copies, since answers to judge are truncated after some tokens.

    Args:
        alignment: rows with prompt, response and kind.
        harmful: rows with prompt and response.
        development: rows with prompt, response and label.
        sentiment: rows with a sentence.
    """
    rng = random.Random(0)
    alignment, harmful = [without_added_opening(r) for r in alignment], [without_added_opening(r) for r in harmful]
    requests = [r["prompt"] for r in harmful]
    helpful = [r for r in alignment if r["kind"] == "helpful"]
    rows = [TrainingRow(r["prompt"], r["response"], "refusal") for r in alignment if r["kind"] == "refusal"]
    rows += [TrainingRow(r["prompt"], r["response"], "compliance") for r in harmful]
    rows += [TrainingRow(r["prompt"], r["response"], "compliance") for r in helpful]
    rows += [TrainingRow(rng.choice(requests), r["response"], "beside_the_point", MISMATCH_WEIGHT) for r in helpful]
    sampled = rng.sample(list(sentiment), 300)
    rows += [TrainingRow(rng.choice(requests), r["sentence"], "beside_the_point") for r in sampled]
    rows += [TrainingRow(p, r, "beside_the_point") for p, r in degenerate_answers(requests, helpful, rng)]
    rows += [TrainingRow(r["prompt"], r["response"], r["label"], DEVELOPMENT_WEIGHT) for r in development]
    return rows + list(truncated_copies(rows, rng))


def without_added_opening(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without the opening that was added to its answer."""
    opening = next((o for o in ADDED_OPENINGS if row["response"].startswith(o)), "")
    return row | {"response": row["response"].removeprefix(opening)}


def degenerate_answers(
    requests: Sequence[str], helpful: Sequence[dict[str, Any]], rng: random.Random
) -> Iterable[tuple[str, str]]:
    """Yield pairs of a request and an echo, a fragment, a repetition, word salad or another request."""
    vocabulary = [w for r in helpful for w in r["response"].split()]
    for prompt in rng.sample(list(requests), min(90, len(requests))):
        words = prompt.split()
        other_words = rng.choices(vocabulary, k=4)
        start = rng.randrange(len(words))
        yield prompt, prompt
        yield prompt, " ".join(words[start : start + 4])
        yield prompt, " ".join([rng.choice(words + other_words)] * rng.randint(2, 30))
        yield prompt, " ".join(rng.choices(other_words, k=rng.randint(4, 30)))
        yield prompt, " ".join(rng.choices(vocabulary, k=rng.randint(1, 6)))
        yield prompt, rng.choice(helpful)["prompt"]


def truncated_copies(rows: Iterable[TrainingRow], rng: random.Random) -> Iterable[TrainingRow]:
    """Yield copies of some long rows, truncated after 12 to 30 words."""
    for row in rows:
        words = row.response.split()
        length = rng.randint(12, 30)
        if len(words) > length and rng.random() < CUT_SHARE:
            yield TrainingRow(row.prompt, " ".join(words[:length]), row.verdict, row.weight)


def read_embedded(name: str) -> list[dict[str, Any]]:
    """Return the rows of an embedded file, by its name without extension."""
    lines = (EMBEDDED / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]
