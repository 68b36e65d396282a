"""SST-2: classify the sentiment of a review as positive or negative."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

from lisa_lightning.data.normal_form import normal_value
from lisa_lightning.data.reading import format_value
from lisa_lightning.data.source import Row
from lisa_lightning.runtime.errors import UserError

INSTRUCTION: Final = "Analyze the sentiment of the input, and respond only positive or negative"
LABELS: Final = {"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"}


@final
class SST2:
    """Lisa's prompt and rule (section 5.1 of the paper). Field `label` is 0 or negative, 1 or positive."""

    fields: ClassVar[tuple[str, ...]] = ("sentence", "label")
    optional: ClassVar[tuple[str, ...]] = ()
    stripped: ClassVar[tuple[str, ...]] = ("sentence",)
    """Almost all published sentences end with a blank."""

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return the sentence and the word for its label.

        Raises:
            UserError: if the label is unknown.
        """
        label = LABELS.get(normal_value(record["label"]) or "")
        if label is None:
            raise UserError(
                f"label {format_value(record['label'])} of an SST-2 row; allowed: {', '.join(LABELS)}. "
                "Fix: correct it, or map it by `labels`"
            )
        return Row(INSTRUCTION, str(record["sentence"]), label)

    def correct(self, answer: str, target: str) -> bool:
        """Return whether the answer is the word alone, in lower case or capitalized."""
        return answer.strip() in (target, target.capitalize())

    def correct_leniently(self, answer: str, target: str) -> bool:
        """Return whether the first of the two words in the answer is correct, ignoring case and other words."""
        match = re.search(r"\b(positive|negative)\b", answer.lower())
        return match is not None and match[1] == target
