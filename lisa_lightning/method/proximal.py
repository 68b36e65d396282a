"""The proximal term without alternation: fine-tuning on the user's rows, tied to the aligned model."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, NonNegative, Share
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.proximal import proximal_gradient


@final
@dataclass(frozen=True, config=STRICT)
class Proximal(Method):
    """Add rho/2 * ||w - w_aligned||^2 to plain fine-tuning: "only proximal" in Table 10 of the Lisa paper.

    Equal to Lisa with alignment_steps=0, whose anchor never moves. One forward and one backward pass a step.

    Departure of the official code from the paper:
        - The penalty is zero during the first tenth of the steps; proximal_after=0 is the paper's form.
    """

    rho: NonNegative = 0.1
    """Proximal factor; 0 is SFT. The paper's value is 1."""
    proximal_after: Share = 0.1
    """Share of all steps before the penalty starts. The official code has 0.1, the paper 0."""

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the proximal term."""
        return proximal_gradient(backprop, step, state["anchor"], self.rho, start=self.proximal_after * step.total)
