"""Lisa, lazy safety alignment: bi-state optimization with a proximal term."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, CountOrZero, NonNegative, Share
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.proximal import proximal_gradient


@final
@dataclass(frozen=True, config=STRICT)
class Lisa(Method):
    """Alternate K1 alignment steps and K2 user steps under a proximal term (Huang et al., NeurIPS 2024, Algorithm 2).

    Each step descends

        loss(w) + rho/2 * ||w - anchor||^2

    where the anchor is the last iterate of the other state. One forward and one backward pass a step. With
    alignment_steps=0 it is `proximal`, with rho=0 `bso`.

    Departures of the official code from the paper:
        - The penalty is zero during the first tenth of the steps; proximal_after=0 is the paper's form.
        - User rows drawn during alignment steps are discarded; see data.during_alignment.
    """

    alignment_steps: CountOrZero = 5
    """K1, alignment steps of a cycle. The paper's value is 100."""
    user_steps: CountOrZero = 25
    """K2, user steps of a cycle. The paper's value is 900."""
    rho: NonNegative = 0.1
    """Proximal factor. The paper's value is 1."""
    proximal_after: Share = 0.1
    """Share of all steps before the penalty starts. The official code has 0.1, the paper 0."""

    def __post_init__(self) -> None:
        Schedule(self.alignment_steps, self.user_steps)

    @property
    def schedule(self) -> Schedule:
        """K1 alignment steps, then K2 user steps."""
        return Schedule(self.alignment_steps, self.user_steps)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the proximal term."""
        return proximal_gradient(backprop, step, state["anchor"], self.rho, start=self.proximal_after * step.total)
