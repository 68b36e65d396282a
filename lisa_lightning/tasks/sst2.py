"""SST-2: is a review's sentiment positive or negative?"""

from typing import Any, final

from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import alpaca
from lisa_lightning.errors import UserError

INSTRUCTION = "Analyze the sentiment of the input, and respond only positive or negative"
LABELS = {"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"}


@final
class SST2:
    """The papers' prompt and rule; fields `sentence` and `label` (0 or negative, 1 or positive)."""

    fields = ("sentence", "label")
    max_new_tokens = 4
    """Either word and the end of text; what goes on longer is wrong under the rule all the same."""

    def row(self, record: dict[str, Any]) -> Row:
        """The training row of a record. Raises UserError on another label."""
        label = LABELS.get(str(record["label"]).strip().lower())
        if label is None:
            raise UserError(f"label {record['label']!r} of an SST-2 row; allowed: {', '.join(LABELS)}")
        return Row(alpaca(INSTRUCTION, str(record["sentence"]).strip()), label)

    def correct(self, answer: str, target: str) -> bool:
        """The papers' strict rule: the word alone, in lower case or capitalized."""
        return answer.strip() in (target, target.capitalize())
