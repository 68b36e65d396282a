"""AsFT: fine-tuning restricted to the direction in which alignment changed the model."""

from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, NonNegative
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method
from lisa_lightning.model.alignment_delta import Delta, matching_deltas
from lisa_lightning.model.factors import modules
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.loss import no_autocast


@final
@dataclass(frozen=True, config=STRICT)
class AsFT(Method):
    """Add lamb * sum over layers of ||(I - C) B A||_F^2 to the loss (Yang et al., AAAI 2026, Eq. 6).

    C = V V^T / ||V||_F, where V is the change of the layer at alignment. C is no projector: where V is small, the
    penalty is plain weight decay of B A. In layers that alignment left unchanged C is 0. As in the official code, B A
    is not multiplied by alpha/r.

    One forward and one backward pass a step. The penalty costs products with r columns only. The official code builds C
    and I for every layer and step, twice 4096 x 4096 floats a layer.
    """

    lamb: NonNegative = 1.0
    """Factor of the penalty; 0 is SFT. The official script has 1."""
    per_micro_batch: bool = False
    """Add the penalty once per micro-batch, as the official code does: it divides the loss by their number only."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Factors B A, and the change of the weights at alignment."""
        return frozenset({"adapter", "alignment_update"})

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if alignment changed none of the adapted layers."""
        matching_deltas(backprop.deltas, modules(backprop.names))
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the penalty."""
        loss, gradients = backprop.gradient(step.main)
        factor = self.lamb * (len(step.main.micro_batches) if self.per_micro_batch else 1)
        penalty = torch.zeros((), device=backprop.device)
        index = {name: i for i, name in enumerate(backprop.names)}
        for layer, pair in modules(backprop.names).items() if self.lamb > 0 else ():
            a, b = (backprop.weights[index[name]].detach().requires_grad_() for name in pair)
            term = factor * distance(a, b, backprop.deltas.get(layer))
            for name, gradient in zip(pair, torch.autograd.grad(term, (a, b)), strict=True):
                gradients[index[name]] += gradient
            penalty += term.detach()
        return StepOutput(loss, gradients, {"asft/penalty": penalty.item()})


def distance(a: Tensor, b: Tensor, delta: Delta | None) -> Tensor:
    """Return ||(I - C) B A||_F^2 of A [r, in] and B [out, r], through r x r products; C is 0 without a delta."""
    with no_autocast(b.device):  # in bfloat16 a sum of squares may be negative
        remainder = b - delta.project(b) if delta is not None else b
        return ((remainder.T @ remainder) * (a @ a.T)).sum()
