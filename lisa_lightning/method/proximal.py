"""The proximal penalty alone: fine-tuning on the user's rows, tied to where it began."""

from typing import final

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.proximal import pulled


@final
class Proximal(Method):
    """rho/2 * ||w - w_aligned||^2 on top of plain fine-tuning: the "only proximal" of the Lisa paper's Table 10.

    Equal to Lisa with alignment_steps=0, whose anchor never moves. One forward and one backward pass a step. Departure
    of the official code from the paper: the penalty rests during the first tenth of the steps (`proximal_after`).

    Args:
        rho: proximal factor, >= 0; 0 is SFT.
        proximal_after: share of all steps before the penalty starts (strictly after), 0..1.
    """

    def __init__(self, rho: float, proximal_after: float) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.rho = rho
        self.proximal_after = proximal_after

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss and the proximal penalty."""
        return pulled(passes, step, self.anchor, self.rho, rests=self.proximal_after * self.total_steps)
