"""EWC: fine-tuning with every weight tied to its start, as strongly as the loss on alignment rows depends on it."""

from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, NonNegative
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput


@final
@dataclass(frozen=True, config=STRICT)
class EWC(Method):
    """Add lamb * sum_j F_j (w_j - w0_j)^2 to plain fine-tuning (Kirkpatrick et al., 2017, as in the Lisa code).

    F_j is the sum over batches of alignment rows of the squared gradient of the batch's mean loss at w0, with dropout.
    It is neither halved nor divided by the number of batches, so lamb depends on number and size of the batches. With
    fisher_batch_size=1 it is the diagonal of the empirical Fisher matrix, times the number of rows.

    EWC is meant for an adapter that is trained further (`model.adapters=continued`). In a fresh adapter B is zero, so A
    has no gradient and is not tied. One forward and one backward pass a step, and before the first step one over all
    alignment rows.
    """

    lamb: NonNegative = 1e9
    """Factor of the penalty; 0 is SFT. The papers' scripts have 1e9; take less with more batches."""
    fisher_batch_size: Count = 10
    """Rows of a batch of the Fisher sum. The papers' scripts have 5."""
    carry_over: bool = False
    """Add the last Fisher batch's gradient to the first step's, a mistake of the official code."""

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the penalty; the first step computes the Fisher sum."""
        update: State = {}
        carried: list[Tensor] = []
        if "fisher" not in state:
            update["fisher"], carried = self._fisher(backprop)
        fisher = (state | update)["fisher"]
        loss, gradients = backprop.gradient(step.main)
        penalty = torch.zeros((), device=backprop.device)
        for gradient, w, w0, f in zip(gradients, backprop.weights, state["anchor"], fisher, strict=True):
            difference = w.detach() - w0
            gradient.add_(2 * self.lamb * f * difference)
            penalty += self.lamb * (f * difference.square()).sum()
        if self.carry_over and carried:
            gradients = [gradient + last for gradient, last in zip(gradients, carried, strict=True)]
        return StepOutput(loss, gradients, {"ewc/penalty": penalty.item()}, update)

    def _fisher(self, backprop: Backprop) -> tuple[list[Tensor], list[Tensor]]:
        """Return the sum of squared gradients, and the gradient of the last batch."""
        sums = [torch.zeros_like(w) for w in backprop.weights]
        last: list[Tensor] = []
        for batch in backprop.iter_stream("alignment", self.fisher_batch_size):
            _, last = backprop.gradient(batch)
            for total, gradient in zip(sums, last, strict=True):
                total.add_(gradient.square())
        return sums, last
