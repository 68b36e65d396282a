"""GSM8K: word problems of grade-school arithmetic, whose answer is a number."""

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

from lisa_lightning.data.source import Row
from lisa_lightning.runtime.errors import UserError

FINAL: Final = "The final answer is: "
NUMBER: Final = re.compile(r"-?\d+\.?\d*")
ANNOUNCED: Final = re.compile(r"(?:####|answer(?: is|:)|boxed\{)[^\d\n-]*(-?\d+\.?\d*)", re.IGNORECASE)


@final
class GSM8K:
    """Lisa's prompt and rule (section 5.1 of the paper); fields `question` and `answer` with its `####` line."""

    fields: ClassVar[tuple[str, ...]] = ("question", "answer")
    optional: ClassVar[tuple[str, ...]] = ()

    def row(self, record: Mapping[str, Any]) -> Row:
        """The question, and the reasoning with `####` spelt out (which leaves two blanks before the number)."""
        answer = str(record["answer"])
        _, mark, result = answer.partition("####")
        if not mark or not NUMBER.search(result.replace(",", "")):
            raise UserError("the answer of a GSM8K row has no #### with a number after it")
        return Row(str(record["question"]), "", answer.replace("####", FINAL))

    def correct(self, answer: str, target: str) -> bool:
        """The number after the first `The final answer is: `, else the last one, equals the target's."""
        return final_number(answer) == final_number(target)

    def correct_leniently(self, answer: str, target: str) -> bool:
        """That, or the last number, or one announced in another way (`#### 5`, `the answer is $5`), is right."""
        wanted, text = final_number(target), answer.replace(",", "")
        announced = [float(n) for n in ANNOUNCED.findall(text)]
        return wanted in (final_number(answer), *announced[:1], *(float(n) for n in NUMBER.findall(text)[-1:]))


def final_number(text: str) -> float:
    """The official rule's number of an answer, commas left out; infinity where there is none."""
    text = text.replace(",", "")
    numbers = NUMBER.findall(text)
    after = NUMBER.findall(text.split(FINAL, 1)[1]) if FINAL in text else []
    return float((after or numbers[-1:] or [math.inf])[0])
