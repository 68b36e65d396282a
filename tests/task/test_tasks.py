"""The papers' rules for correct answers, and the lenient rules beside them."""

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_lightning.data.templates import alpaca
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.task.agnews import AGNews
from lisa_lightning.task.alpaca import Alpaca
from lisa_lightning.task.base import Scored
from lisa_lightning.task.gsm8k import ANSWER_PREFIX, GSM8K, final_number
from lisa_lightning.task.sst2 import SST2

# (task, answer, target, strictly right, leniently right)
ANSWERS = [
    (SST2(), "positive", "positive", True, True),
    (SST2(), " Positive\n", "positive", True, True),
    (SST2(), "POSITIVE", "positive", False, True),
    (SST2(), "positive.", "positive", False, True),
    (SST2(), "Negative. It is not positive at all.", "negative", False, True),
    (SST2(), "The sentiment is positive.", "negative", False, False),
    (SST2(), "positively so", "positive", False, False),
    (SST2(), "", "negative", False, False),
    (AGNews(), "World", "World", True, True),
    (AGNews(), "world", "World", True, True),
    (AGNews(), "Sci/Tech", "Sci/Tech", True, True),
    (AGNews(), "sci", "Sci/Tech", True, True),
    (AGNews(), "sci/tech", "Sci/Tech", False, True),
    (AGNews(), "Technology, since it is about phones", "Sci/Tech", False, True),
    (AGNews(), "This is Business news, not Sports.", "Business", False, True),
    (AGNews(), "This is Business news, not Sports.", "Sports", False, False),
    (AGNews(), "worldly", "World", False, False),
    (GSM8K(), f"5+13 = 18\n{ANSWER_PREFIX} 18", f"x\n{ANSWER_PREFIX} 18", True, True),
    (GSM8K(), f"{ANSWER_PREFIX}$1,200.00 a year, of 12", f"x\n{ANSWER_PREFIX} 1,200", True, True),
    (GSM8K(), "so it makes 7 and then 18.", f"x\n{ANSWER_PREFIX} 18", True, True),
    (GSM8K(), "so 18, which is 3 more than 15", f"x\n{ANSWER_PREFIX} 18", False, False),
    (GSM8K(), "the answer is 18, which is 3 more than 15", f"x\n{ANSWER_PREFIX} 18", False, True),
    (GSM8K(), f"{ANSWER_PREFIX}eighteen. That is 18", f"x\n{ANSWER_PREFIX} 18", True, True),
    (GSM8K(), f"{ANSWER_PREFIX} 18 because 6*3 = 18 and no 20", f"x\n{ANSWER_PREFIX} 20", False, True),
    (GSM8K(), "-18", f"x\n{ANSWER_PREFIX} 18", False, False),
    (GSM8K(), "I don't know", f"x\n{ANSWER_PREFIX} 18", False, False),
]


@pytest.mark.parametrize(("task", "answer", "target", "strict", "lenient"), ANSWERS)
def test_rules(task: Scored, answer: str, target: str, strict: bool, lenient: bool) -> None:
    assert task.correct(answer, target) is strict
    assert task.correct_leniently(answer, target) is lenient


WORDS = st.sampled_from(
    [
        "positive",
        "Negative",
        "World",
        "sports",
        "sci",
        "Sci/Tech",
        "18",
        "1,8",
        "-18",
        ANSWER_PREFIX,
        "####",
        ".",
        "\n",
        "so",
    ]
)


@given(st.lists(WORDS, max_size=6).map(" ".join), st.sampled_from(ANSWERS))
def test_what_is_strictly_right_is_leniently_right(answer: str, case: tuple[Any, ...]) -> None:
    task, _, target, _, _ = case
    if task.correct(answer, target):
        assert task.correct_leniently(answer, target)


@given(st.integers(0, 10**9), st.booleans())
def test_a_number_is_read_with_and_without_thousands_commas(number: int, marked: bool) -> None:
    for text in (f"{number:,}", str(number)):
        assert final_number(f"2 and {ANSWER_PREFIX} {text} of 3" if marked else f"2, 3 and {text}") == number


@pytest.mark.parametrize(
    "label", [0, "0", 0.0, "0.0", "0e0", Decimal("0.00"), "negative", " Negative ", "NEGATIVE\u200b"]
)
def test_sst2_knows_a_label_by_number_and_name(label: object) -> None:
    row = SST2().row({"sentence": "a dull film", "label": label})
    assert (row.context, row.response) == ("a dull film", "negative")
    assert alpaca(row.instruction, row.context).endswith("### Input:\na dull film\n\n### Response:")


def test_agnews_numbers_sections_as_the_hub_does() -> None:
    sections = [AGNews().row({"text": "t", "label": label}).response for label in (0, 1.0, "2.0", "sci/tech")]
    assert sections == ["World", "Sports", "Business", "Sci/Tech"]
    for label in ("4", True, "01"):
        with pytest.raises(UserError, match=f"label {label!r} of an AG News row; allowed: 0 to 3, World"):
            AGNews().row({"text": "t", "label": label})


def test_gsm8k_spells_its_mark_out_with_two_blanks() -> None:
    row = GSM8K().row({"question": "How many?", "answer": "2*3=<<2*3=6>>6\n#### 6"})
    assert row.response == "2*3=<<2*3=6>>6\nThe final answer is:  6"
    assert GSM8K("\nThink.\n").row({"question": "How many?", "answer": "#### 6"}).instruction == "How many?\nThink.\n"
    for answer in ("6", "2*3=6 #### six"):  # without a number every answer that has none would be right
        with pytest.raises(UserError, match="no #### with a number after it"):
            GSM8K().row({"question": "How many?", "answer": answer})


def test_alpaca_has_no_rule_of_its_own() -> None:
    assert not isinstance(Alpaca(), Scored)
    row = Alpaca().row({"instruction": "Sort.", "input": "b a", "output": "a b"})
    assert (row.instruction, row.context, row.response) == ("Sort.", "b a", "a b")
