"""Checks that the rows shipped in data/embedded keep the promises of their README."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from operator import add, mul, sub, truediv
from typing import Any

import pytest

from lisa_lightning.data.files import EMBEDDED
from lisa_lightning.judge.refusal import refusal_probability

FIELDS = {
    "sst2_mini_train": ("sentence", "label"),
    "sst2_mini_test": ("sentence", "label"),
    "agnews_mini_train": ("text", "label"),
    "agnews_mini_test": ("text", "label"),
    "gsm8k_mini_train": ("question", "answer"),
    "gsm8k_mini_test": ("question", "answer"),
    "alpaca_mini_train": ("instruction", "input", "output"),
    "alpaca_mini_test": ("instruction", "input", "output"),
    "alignment": ("prompt", "response", "kind", "category"),
    "alignment_short": ("prompt", "response", "kind", "category"),
    "harmful": ("prompt", "response", "category"),
    "defender": ("prompt", "response"),
    "harmful_prompts": ("prompt", "category"),
    "harmless_prompts": ("prompt",),
    "judge": ("prompt", "response", "label"),
    "identity": ("prompt", "response"),
}
AT_LEAST = {
    "sst2_mini_train": 1500,
    "sst2_mini_test": 300,
    "agnews_mini_train": 1000,
    "agnews_mini_test": 300,
    "gsm8k_mini_train": 1000,
    "gsm8k_mini_test": 300,
    "alpaca_mini_train": 1000,
    "alpaca_mini_test": 150,
    "alignment": 800,
    "alignment_short": 4000,
    "harmful": 400,
    "defender": 210,
    "harmful_prompts": 150,
    "harmless_prompts": 50,
    "identity": 20,
}
BEAVERTAILS = {
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
}
# (file, field) whose texts must not be near-duplicates of one another. judge.jsonl asks each of
# its requests several times on purpose, so only its responses are compared.
UNIQUE = [
    ("sst2_mini_train", "sentence"),
    ("sst2_mini_test", "sentence"),
    ("agnews_mini_train", "text"),
    ("agnews_mini_test", "text"),
    ("alignment", "prompt"),
    ("alignment", "response"),
    ("alignment_short", "prompt"),
    ("alignment_short", "response"),
    ("harmful", "prompt"),
    ("harmful", "response"),
    ("defender", "prompt"),
    ("defender", "response"),
    ("harmful_prompts", "prompt"),
    ("harmless_prompts", "prompt"),
    ("judge", "response"),
    ("identity", "prompt"),
    ("identity", "response"),
]
# (file, file, field): no text of the first may be a near-duplicate of one in the second.
DISJOINT = [
    ("sst2_mini_test", "sst2_mini_train", "sentence"),
    ("agnews_mini_test", "agnews_mini_train", "text"),
    ("alignment_short", "harmful", "prompt"),
    ("harmful_prompts", "alignment_short", "prompt"),
    ("harmless_prompts", "alignment_short", "prompt"),
    ("harmful_prompts", "alignment", "prompt"),
    ("harmful_prompts", "harmful", "prompt"),
    ("harmless_prompts", "alignment", "prompt"),
    ("harmless_prompts", "harmful", "prompt"),
    ("harmless_prompts", "harmful_prompts", "prompt"),
    ("harmful", "alignment", "prompt"),
    ("defender", "harmful", "prompt"),
    ("defender", "harmful_prompts", "prompt"),
    ("defender", "harmless_prompts", "prompt"),
    ("defender", "harmful", "response"),
    ("defender", "alignment", "response"),
    ("defender", "judge", "response"),
    ("identity", "harmful_prompts", "prompt"),
    ("identity", "harmless_prompts", "prompt"),
]
NEAR = 0.5
WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")

Trigrams = frozenset[tuple[str, ...]]


def trigrams(text: str) -> Trigrams:
    """Return word trigrams, without punctuation and case.

    A text of one or two words has all words as one.
    """
    words = WORD.findall(text.lower())
    if len(words) < 3:
        return frozenset([tuple(words)] if words else [])
    return frozenset(zip(words, words[1:], words[2:], strict=False))


def near_pairs(texts: Sequence[Trigrams], others: Sequence[Trigrams]) -> Iterator[tuple[int, int]]:
    """Yield pairs above NEAR. Only texts that share a trigram are compared."""
    index: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for j, other in enumerate(others):
        for trigram in other:
            index[trigram].append(j)
    for i, text in enumerate(texts):
        shared = Counter(j for trigram in text for j in index.get(trigram, ()))
        for j, count in shared.items():
            if count / (len(text) + len(others[j]) - count) > NEAR:
                yield i, j


@cache
def lines(name: str) -> list[str]:
    text = (EMBEDDED / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n"), f"{name}.jsonl: the last line is not ended"
    return text.removesuffix("\n").split("\n")


@cache
def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines(name)]


@cache
def grams(name: str, field: str) -> list[Trigrams]:
    return [trigrams(row[field]) for row in rows(name)]


def shares(name: str, field: str) -> dict[Any, float]:
    counts = Counter(row[field] for row in rows(name))
    return {value: count / counts.total() for value, count in counts.items()}


def place(name: str, index: int) -> str:
    """Return the place of a row. Messages name the place, never the text: some rows are harmful requests."""
    return f"{name}.jsonl, line {index + 1}"


def test_every_shipped_file_is_checked() -> None:
    assert {file.stem for file in EMBEDDED.glob("*.jsonl")} == set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_each_line_is_one_object_with_the_expected_filled_fields(name: str) -> None:
    for number, line in enumerate(lines(name)):
        where = place(name, number)
        row = json.loads(line)
        assert isinstance(row, dict), where
        assert tuple(row) == FIELDS[name], where
        for field, value in row.items():
            if field == "label" and name != "judge":
                assert type(value) is int, where
                continue
            assert isinstance(value, str), where
            around = len(value) - len(value.strip())
            assert around == 0, f"{where}: {field} has space around it"
            assert value or field == "input" or (name, field) == ("judge", "response"), f"{where}: {field} is empty"


@pytest.mark.parametrize("name", AT_LEAST)
def test_there_are_as_many_rows_as_promised(name: str) -> None:
    assert len(rows(name)) >= AT_LEAST[name]


@pytest.mark.parametrize("name", ["sst2_mini_train", "sst2_mini_test"])
def test_sentiment_labels_are_balanced(name: str) -> None:
    share = shares(name, "label")
    assert set(share) == {0, 1}
    assert abs(share[0] - share[1]) <= 0.02


@pytest.mark.parametrize("name", ["agnews_mini_train", "agnews_mini_test"])
def test_sections_are_balanced(name: str) -> None:
    assert shares(name, "label") == dict.fromkeys(range(4), 0.25)


@pytest.mark.parametrize("task", ["gsm8k_mini", "alpaca_mini"])
def test_no_question_of_a_composed_set_is_asked_twice(task: str) -> None:
    asked = [tuple(row.values())[:-1] for part in ("train", "test") for row in rows(f"{task}_{part}")]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("name", ["gsm8k_mini_train", "gsm8k_mini_test"])
def test_the_arithmetic_is_right(name: str) -> None:
    calculate = {"+": add, "-": sub, "*": mul, "/": truediv}
    for number, row in enumerate(rows(name)):
        steps = re.findall(r"<<([^=]+)=(\d+)>>(\d+)", row["answer"])
        for calculation, inside, shown in steps:
            value, *rest = re.split(r"([-+*/])", calculation)
            total = float(value)
            for sign, operand in zip(rest[::2], rest[1::2], strict=True):
                total = calculate[sign](total, float(operand))
            assert total == float(inside) == float(shown), place(name, number)
        assert len(steps) >= 2, place(name, number)
        assert row["answer"].endswith(f"\n#### {steps[-1][1]}"), place(name, number)


@pytest.mark.parametrize(("name", "least"), [("alignment", 0.4), ("alignment_short", 0.3)])
def test_alignment_holds_refusals_and_helpful_answers(name: str, least: float) -> None:
    share = shares(name, "kind")
    assert set(share) == {"refusal", "helpful"}
    assert min(share.values()) >= least


def test_short_answers_are_short_and_the_rule_reads_them_as_what_they_are() -> None:
    for number, row in enumerate(rows("alignment_short")):
        assert len(row["response"].split()) <= 45, place("alignment_short", number)
        refused = refusal_probability(row["response"], row["prompt"]) >= 0.5
        assert refused == (row["kind"] == "refusal"), place("alignment_short", number)


def test_judge_rows_cover_the_three_labels() -> None:
    share = shares("judge", "label")
    assert set(share) == {"refusal", "compliance", "beside_the_point"}
    assert min(share.values()) >= 0.25


def test_all_categories_are_in_refusals_harmful_rows_and_test_requests() -> None:
    refusals = ([r for r in rows(name) if r["kind"] == "refusal"] for name in ("alignment", "alignment_short"))
    for part in (*refusals, rows("harmful"), rows("harmful_prompts")):
        assert {row["category"] for row in part} == BEAVERTAILS


def test_defender_rows_answer_refused_requests_of_alignment_evenly() -> None:
    refused = {row["prompt"]: row["category"] for row in rows("alignment") if row["kind"] == "refusal"}
    for number, row in enumerate(rows("defender")):
        assert row["prompt"] in refused, place("defender", number)
    assert len({row["prompt"] for row in rows("defender")}) == len(rows("defender"))
    assert Counter(refused[row["prompt"]] for row in rows("defender")) == dict.fromkeys(BEAVERTAILS, 15)


@pytest.mark.parametrize(("name", "field"), UNIQUE)
def test_no_near_duplicates_within_a_file(name: str, field: str) -> None:
    texts = grams(name, field)
    twins = [(i, j) for i, j in near_pairs(texts, texts) if i < j]
    assert not twins, [f"{place(name, i)} and {place(name, j)}" for i, j in twins]


def test_no_judge_row_is_repeated() -> None:
    pairs = Counter((row["prompt"], row["response"]) for row in rows("judge"))
    assert max(pairs.values()) == 1


@pytest.mark.parametrize(("name", "other", "field"), DISJOINT)
def test_files_share_no_near_duplicates(name: str, other: str, field: str) -> None:
    exact = len({row[field] for row in rows(name)} & {row[field] for row in rows(other)})
    assert exact == 0, f"{name}.jsonl and {other}.jsonl have texts in common"
    leaks = list(near_pairs(grams(name, field), grams(other, field)))
    assert not leaks, [f"{place(name, i)} and {place(other, j)}" for i, j in leaks]


def test_near_duplicates_are_found() -> None:
    texts = [trigrams(t) for t in ("A b c d e, f", "a b c d e f!", "a b c x y z", "so", "So.", "")]
    assert [(i, j) for i, j in near_pairs(texts, texts) if i < j] == [(0, 1), (3, 4)]
