"""GSM8K: solve grade-school word problems with a number as the answer."""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT
from lisa_lightning.data.source import Row
from lisa_lightning.runtime.errors import UserError

ANSWER_PREFIX: Final = "The final answer is: "
NUMBER: Final = re.compile(r"-?\d+\.?\d*")
ANNOUNCED_NUMBER: Final = re.compile(r"(?:####|answer(?: is|:)|boxed\{)[^\d\n-]*(-?\d+\.?\d*)", re.IGNORECASE)


@final
@dataclass(frozen=True, config=STRICT)
class GSM8K:
    """Lisa's prompt and rule (section 5.1 of the paper). Fields: `question`, and `answer` with its `####` line."""

    fields: ClassVar[tuple[str, ...]] = ("question", "answer")
    optional: ClassVar[tuple[str, ...]] = ()

    question_suffix: str = ""
    """Text after every question. Vaccine's official code asks there for a step-by-step answer."""

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return the question with its suffix, and the reasoning with `####` replaced by the answer prefix.

        Two blanks precede the number.

        Raises:
            UserError: if no number follows `####`.
        """
        answer = str(record["answer"])
        _, marker, result = answer.partition("####")
        if not marker or not NUMBER.search(result.replace(",", "")):
            raise UserError(
                "the answer of a GSM8K row has no #### with a number after it. Fix: correct or delete the row"
            )
        return Row(f"{record['question']}{self.question_suffix}", "", answer.replace("####", ANSWER_PREFIX))

    def correct(self, answer: str, target: str) -> bool:
        """Return whether the final numbers of answer and target are equal, see `final_number`."""
        return final_number(answer) == final_number(target)

    def correct_leniently(self, answer: str, target: str) -> bool:
        """Return whether one of these numbers of the answer equals the target's:

        - the final number of the strict rule;
        - the last number;
        - the first number that is announced in another form (`#### 5`, `the answer is $5`).
        """
        expected, text = final_number(target), answer.replace(",", "")
        announced = [float(n) for n in ANNOUNCED_NUMBER.findall(text)]
        return expected in (final_number(answer), *announced[:1], *(float(n) for n in NUMBER.findall(text)[-1:]))


def final_number(text: str) -> float:
    """Return the number that the official rule compares, without commas.

    Returns:
        The first number after the first `The final answer is: `. Without one the last number, and infinity if the text
        has no number.
    """
    text = text.replace(",", "")
    numbers = NUMBER.findall(text)
    final_numbers = NUMBER.findall(text.split(ANSWER_PREFIX, 1)[1]) if ANSWER_PREFIX in text else []
    return float((final_numbers or numbers[-1:] or [math.inf])[0])
