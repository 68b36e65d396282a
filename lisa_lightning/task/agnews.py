"""AG News: which of four sections does an article belong to?"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Final, final

from lisa_lightning.data.normal_form import normal_value
from lisa_lightning.data.reading import shown
from lisa_lightning.data.source import Row
from lisa_lightning.runtime.errors import UserError

INSTRUCTION: Final = (
    "Categorize the news article given in the input into one of the 4 categories:"
    "\n\nWorld\nSports\nBusiness\nSci/Tech\n"
)
LABELS: Final = ("World", "Sports", "Business", "Sci/Tech")
"""In the order of the hub's labels 0 to 3."""
ALSO: Final = {"Sci/Tech": "sci"}
"""Apart from the label itself the official script takes its lower case, but for this one, where it takes this."""
NAMES: Final = re.compile(r"\b(?:(world)|(sports?)|(business)|(sci\b|sci[/ -]?tech|science|technology))\b")


@final
class AGNews:
    """Lisa's prompt and rule (section 5.1 of the paper); `label` is 0 to 3 or a section's name."""

    fields: ClassVar[tuple[str, ...]] = ("text", "label")
    optional: ClassVar[tuple[str, ...]] = ()

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return the article and the name of its section. Raises UserError on another label."""
        label = normal_value(record["label"])
        section = next((name for i, name in enumerate(LABELS) if label in (str(i), name.lower())), None)
        if section is None:
            raise UserError(
                f"label {shown(record['label'])} of an AG News row; allowed: 0 to 3, {', '.join(LABELS)}. "
                "Fix: correct it, or map it by `labels`"
            )
        return Row(INSTRUCTION, str(record["text"]).strip(), section)

    def correct(self, answer: str, target: str) -> bool:
        """The name alone, or in lower case; `sci` counts for Sci/Tech and `sci/tech` doesn't."""
        return answer.strip() in (target, ALSO.get(target, target.lower()))

    def correct_leniently(self, answer: str, target: str) -> bool:
        """The first section named in the answer, in any case and among any other words."""
        found = NAMES.search(answer.lower())
        return found is not None and found.lastindex == LABELS.index(target) + 1
