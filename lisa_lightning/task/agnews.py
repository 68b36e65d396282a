"""AG News: classify an article into one of four sections."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

from lisa_lightning.data.normal_form import normal_value
from lisa_lightning.data.reading import format_value
from lisa_lightning.data.source import Row
from lisa_lightning.runtime.errors import UserError

INSTRUCTION: Final = (
    "Categorize the news article given in the input into one of the 4 categories:"
    "\n\nWorld\nSports\nBusiness\nSci/Tech\n"
)
LABELS: Final = ("World", "Sports", "Business", "Sci/Tech")
"""Sections in the order of the hub's labels 0 to 3."""
SECOND_SPELLINGS: Final = {"Sci/Tech": "sci"}
"""Second accepted answer of a label in the official script, where it is not the label in lower case."""
SECTION_NAMES: Final = re.compile(r"\b(?:(world)|(sports?)|(business)|(sci\b|sci[/ -]?tech|science|technology))\b")


@final
class AGNews:
    """Lisa's prompt and rule (section 5.1 of the paper). Field `label` is 0 to 3 or a section's name."""

    fields: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = ()
    stripped: ClassVar[tuple[str, ...]] = ("text",)

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return the article and the name of its section.

        Raises:
            UserError: if the label is unknown.
        """
        label = normal_value(record["label"])
        section = next((name for i, name in enumerate(LABELS) if label in (str(i), name.lower())), None)
        if section is None:
            raise UserError(
                f"label {format_value(record['label'])} of an AG News row; allowed: 0 to 3, {', '.join(LABELS)}. "
                "Fix: correct it, or map it by `labels`"
            )
        return Row(INSTRUCTION, str(record["text"]), section)

    def correct(self, answer: str, target: str) -> bool:
        """Return whether the answer is the section's name or its lower case; for Sci/Tech `sci` replaces `sci/tech`."""
        return answer.strip() in (target, SECOND_SPELLINGS.get(target, target.lower()))

    def correct_leniently(self, answer: str, target: str) -> bool:
        """Return whether the first section that the answer names is correct, ignoring case and other words."""
        match = SECTION_NAMES.search(answer.lower())
        return match is not None and match.lastindex == LABELS.index(target) + 1
