"""EWC: fine-tuning with every weight tied to where it began, as strongly as alignment rows depend on it."""

from typing import final

import torch
from torch import Tensor

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Descent, Passes


@final
class EWC(Method):
    """lamb * sum_j F_j (w_j - w0_j)^2 on top of plain fine-tuning (Kirkpatrick et al., 2017, as the Lisa code has it).

    F_j is the sum, over the alignment rows in batches, of the squared gradient of the batch's mean loss at w0: neither
    halved nor divided by the number of batches, so lamb belongs to a number and size of them; a size of 1 is the
    diagonal of the empirical Fisher matrix, times the number of rows. Dropout is on in it too. Meant for an adapter
    that goes on being trained (`model.adapters=continued`): in a fresh one B is 0, so A has no gradient and isn't tied.
    One forward and one backward pass a step, and once, before the first, one over all alignment rows.

    Args:
        lamb: factor, >= 0; 0 is SFT. The paper's scripts have 1e9.
        fisher_batch_size: rows of a batch of the Fisher sum.
        carry_over: add the last Fisher batch's gradient to the first step's, as the official code does by mistake.
    """

    def __init__(self, lamb: float, fisher_batch_size: int, carry_over: bool) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.lamb = lamb
        self.fisher_batch_size = fisher_batch_size
        self.carry_over = carry_over

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss and the penalty."""
        left: list[Tensor] = []
        if "fisher" not in self.kept:
            self.kept["fisher"], left = self._fisher(passes)
        loss, gradient = passes.gradient(step.main)
        penalty = torch.zeros((), device=passes.device)
        for own, w, w0, f in zip(gradient, passes.weights, self.anchor, self.kept["fisher"], strict=True):
            moved = w.detach() - w0
            own.add_(2 * self.lamb * f * moved)
            penalty += self.lamb * (f * moved.square()).sum()
        if self.carry_over and left:
            gradient = [own + last for own, last in zip(gradient, left, strict=True)]
        return Descent(loss, gradient, {"ewc/penalty": penalty.item()})

    def _fisher(self, passes: Passes) -> tuple[list[Tensor], list[Tensor]]:
        """The sum of squares, and the last batch's gradient."""
        sums = [torch.zeros_like(w) for w in passes.weights]
        last: list[Tensor] = []
        for batch in passes.every_row("alignment", self.fisher_batch_size):
            _, last = passes.gradient(batch)
            for total, g in zip(sums, last, strict=True):
                total.add_(g.square())
        return sums, last
