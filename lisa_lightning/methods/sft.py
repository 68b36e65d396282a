"""Supervised fine-tuning on the user's rows alone: no defense."""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from lisa_lightning.methods.method import Method
from lisa_lightning.schedule import Schedule


@final
class SFT(Method):
    """Plain fine-tuning (the papers' SFT baseline); one forward and one backward pass a step."""

    def __init__(self) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))

    def penalize(self, step: int, weights: Sequence[Tensor]) -> float:
        """No penalty."""
        return 0.0
