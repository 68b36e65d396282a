"""Bi-state optimization: alternate between alignment rows and user rows, without a proximal term."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, CountOrZero
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


@final
@dataclass(frozen=True, config=STRICT)
class BSO(Method):
    """Alternate K1 alignment steps and K2 user steps (Huang et al., NeurIPS 2024, Algorithm 1).

    One forward and one backward pass a step: alignment steps take the place of user steps.

    Departure of the official code from the paper:
        - User rows drawn during alignment steps are discarded; see data.during_alignment.
    """

    alignment_steps: CountOrZero = 5
    """K1, alignment steps of a cycle. The paper's value is 100."""
    user_steps: CountOrZero = 25
    """K2, user steps of a cycle. The paper's value is 900."""

    def __post_init__(self) -> None:
        Schedule(self.alignment_steps, self.user_steps)

    @property
    def schedule(self) -> Schedule:
        """K1 alignment steps, then K2 user steps."""
        return Schedule(self.alignment_steps, self.user_steps)
