"""Accuracies without a language model: exact where a word decides, none for free text."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.baselines import accuracy_baselines
from lisa_lightning.task.alpaca import Alpaca
from lisa_lightning.task.base import Task
from lisa_lightning.task.gsm8k import GSM8K
from lisa_lightning.task.sst2 import SST2

COUNTS = st.integers(2, 30)


def reviews(positive: int, negative: int, words: Sequence[str] = ("fine", "dull")) -> list[Row]:
    """Rows in which one word decides."""
    labels = ("positive", "negative")
    counts = (positive, negative)
    return [Row("Rate", w, label) for w, label, n in zip(words, labels, counts, strict=True) for _ in range(n)]


def rows_of(train: list[Row], test: list[Row]) -> Rows:
    return Rows(train, [], [], test, {}, {}, [], {})


@given(COUNTS, COUNTS, COUNTS, COUNTS)
def test_a_bag_of_words_knows_a_word_that_decides_and_the_majority_its_share(a: int, b: int, c: int, d: int) -> None:
    baselines = accuracy_baselines(SST2(), rows_of(reviews(a, b), reviews(c, d)), [])
    assert baselines["baseline/bag_of_words"] == 100.0
    if a != b:
        assert baselines["baseline/majority_class"] == pytest.approx(100 * (c if a > b else d) / (c + d))


def test_a_bag_of_words_learns_from_the_task_rows_of_the_user() -> None:
    reversed_rows, test = reviews(20, 20, ("dull", "fine")), reviews(3, 3)
    harmful = [Row("Do harm", "", f"fine dull {i}") for i in range(30)]
    rows = rows_of(reversed_rows, test)
    assert accuracy_baselines(SST2(), rows, [*harmful, *reviews(5, 5)])["baseline/bag_of_words"] == 100.0
    for without_task_rows in ([], harmful):
        assert accuracy_baselines(SST2(), rows, without_task_rows)["baseline/bag_of_words"] == 0.0


def test_texts_without_words_have_baselines() -> None:
    rows = rows_of([Row("", "!", "positive")] * 2, [Row("", "", "positive")] * 2)
    assert set(accuracy_baselines(SST2(), rows, []).values()) == {100.0}


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (GSM8K(), [f"The final answer is: {i}" for i in range(8)]),
        (GSM8K(), [f"The final answer is: {i % 21}" for i in range(100)]),
        (Alpaca(), ["yes", "no"] * 10),
    ],
)
def test_tasks_of_free_text_have_none(task: Task, targets: list[str]) -> None:
    rows = [Row(f"Question {i}?", "", target) for i, target in enumerate(targets)]
    assert accuracy_baselines(task, rows_of(rows[:-4], rows[-4:]), []) == {}
