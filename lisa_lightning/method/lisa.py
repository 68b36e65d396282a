"""Lisa, lazy safety alignment: bi-state optimization whose every state is tied to where the last one ended."""

from typing import final

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.proximal import pulled


@final
class Lisa(Method):
    """K1 alignment and K2 user steps with the penalty rho/2 * ||w - anchor||^2 (Huang et al., NeurIPS 2024, Alg. 2).

    One forward and one backward pass a step. With alignment_steps=0 it is `proximal`. Departures of the official code
    from the paper: the penalty rests during the first tenth of the steps (`proximal_after`, 0 for the paper's form),
    and user rows drawn during alignment steps are thrown away (`data.during_alignment=discard`).

    Args:
        rho: proximal factor, >= 0; 0 is BSO.
        proximal_after: share of all steps before the penalty starts (strictly after), 0..1.
    """

    def __init__(self, alignment_steps: int, user_steps: int, rho: float, proximal_after: float) -> None:
        super().__init__(Schedule(alignment_steps, user_steps))
        self.rho = rho
        self.proximal_after = proximal_after

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss and the proximal penalty."""
        return pulled(passes, step, self.anchor, self.rho, rests=self.proximal_after * self.total_steps)
