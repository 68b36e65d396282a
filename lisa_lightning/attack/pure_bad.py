"""Pure bad: the user's data set is a few harmful rows and nothing else."""

from collections.abc import Mapping
from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.attack.base import Attack, refuse_other_rows
from lisa_lightning.config.fields import STRICT, Count
from lisa_lightning.config.settings import RunSettings


@final
@dataclass(frozen=True, config=STRICT)
class PureBad(Attack):
    """Submit `count` harmful rows alone (Qi et al., ICLR 2024, "explicitly harmful examples").

    Threat model: the user controls the rows of a fine-tuning service, and neither training nor weights. The user knows
    some harmful rows and nothing about the defense. The budget is 10, 50 or 100 rows; the paper trains for 5 epochs.
    Here `optim.steps` remains, so that all attacks take equally many steps; `optim.steps=null optim.epochs=5` is the
    paper's.

    The rows are those of `source.harmful` that `harmful_ratio=1` and `data.n=count` draw. Rows of a smaller count are
    among those of a larger one.
    """

    count: Count = 100
    """Harmful rows of the data set, which sets data.n. The paper has 10, 50 and 100."""

    def check(self, settings: RunSettings, choices: Mapping[str, str]) -> None:
        """Check that the data set has `count` rows, all of them harmful.

        Raises:
            UserError: if data.n or harmful_ratio has another value.
        """
        refuse_other_rows(settings, "pure_bad", self.count, "harmful rows", 1)
