"""Booster: alignment that also reduces how much a step on harmful rows would lower their loss."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.align.base import Aligner
from lisa_lightning.align.vaccine import EPSILON, perturbed_gradient
from lisa_lightning.config.fields import STRICT, NonNegative
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.objective.backprop import Backprop, State, StepOutput, norm


@final
@dataclass(frozen=True, config=STRICT)
class Booster(Aligner):
    """Descend f(w) + lamb * (h(w) - h(w - alpha * grad h(w) / ||grad h(w)||)) (Huang et al., ICLR 2025, Eq. 1 and 3).

    f is the loss on alignment rows and h the loss on harmful rows, both on batches of the same size. Second derivatives
    are dropped as in the paper. Three forward and three backward passes, four with `rho`. All passes draw the same
    dropout masks.

    Departures from the official code:
        - Its harmful batch always has 10 rows.
        - Each of its passes draws other dropout masks.
    """

    lamb: NonNegative = 5.0
    """Factor of the regularizer; 0 is SFT on alignment rows. The paper's value is 5; 25 in its tables of GSM8K."""
    alpha: NonNegative = 0.1
    """Length of the harmful step; 0 is SFT too. The paper's value is 0.1."""
    rho: NonNegative = 0.0
    """Norm of Vaccine's perturbation of f; 0 for none. The official script with `perturb_aware` has 5."""
    add_back: bool = False
    """Undo the harmful step by adding it back, as the official code does, rounding errors included."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider."""
        return frozenset({"defender_rows"})

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """The alignment rows, with Vaccine's perturbation."""
        return frozenset({"alignment"} if self.rho > 0 else ())

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of alignment rows and one of harmful rows."""
        return {"alignment": StreamBatch(step), "defender": StreamBatch(step)}

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if the perturbation lacks an attention block in a layer."""
        if self.rho > 0:
            _ = backprop.attention_blocks
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return grad f(w) + lamb * (grad h(w) - grad h(w'))."""
        harmful = step.batches["defender"]
        harmful_loss, harmful_gradients = backprop.gradient(harmful)
        length = self.alpha / (norm(harmful_gradients) + EPSILON)
        moved = [w.detach() - length * g for w, g in zip(backprop.weights, harmful_gradients, strict=True)]
        with backprop.swapped_weights(moved):
            moved_loss, moved_gradients = backprop.gradient(harmful)
        if self.add_back:
            backprop.set_weights([w + length * g for w, g in zip(moved, harmful_gradients, strict=True)])
        if self.rho > 0:
            loss, gradients = perturbed_gradient(backprop, step.main, backprop.attention_blocks, self.rho)
        else:
            loss, gradients = backprop.gradient(step.main)
        terms = zip(gradients, harmful_gradients, moved_gradients, strict=True)
        combined = [f + self.lamb * (h - moved_h) for f, h, moved_h in terms]
        metrics = {"defender/loss": harmful_loss, "booster/reduction": harmful_loss - moved_loss}
        return StepOutput(loss, combined, metrics)
