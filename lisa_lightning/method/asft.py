"""AsFT: fine-tuning held to the direction in which aligning moved the model."""

from typing import final

import torch
from torch import Tensor

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.model.alignment_delta import Delta, changed
from lisa_lightning.model.lora import modules
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.loss import unmixed


@final
class AsFT(Method):
    """lamb * sum over layers of ||(I - C) B A||_F^2 beside the loss (Yang et al., AAAI 2026, Eq. 6).

    C = V V^T / ||V||_F, V being what aligning changed in the layer; C is no projector, so where V is small the penalty
    is plain weight decay of B A; where aligning left a layer as it was, C is 0. As in the official code B A is not
    multiplied by alpha/r. One forward and one backward pass; the penalty costs products with r columns only, where the
    official code builds C and I for every layer and step: 4096 x 4096 floats twice a layer.

    Args:
        lamb: factor, >= 0; 0 is SFT. The official script's is 1.
        per_micro_batch: add the penalty once for each micro-batch, as the official code does, which divides the loss
            but not the penalty by their number.
    """

    needs = frozenset({"aligned change"})

    def __init__(self, lamb: float, per_micro_batch: bool) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.lamb = lamb
        self.per_micro_batch = per_micro_batch
        self.pairs: list[tuple[int, int, Delta | None]] = []
        """Where among the weights a layer's A and B are, and its delta if there is one."""

    def prepare(self, passes: Passes) -> None:
        """Pair each layer's factors with what aligning changed there.

        Raises:
            UserError: aligning changed none of the adapted layers.
        """
        places = {name: i for i, name in enumerate(passes.names)}
        pairs = modules(passes.names)
        deltas = changed(passes.deltas(), pairs)
        for layer, (a, b) in pairs.items():
            delta = deltas[layer].to(passes.device) if layer in deltas else None
            self.pairs.append((places[a], places[b], delta))

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss and the penalty."""
        loss, gradient = passes.gradient(step.main)
        times = len(step.main.micro_batches) if self.per_micro_batch else 1
        penalty = torch.zeros((), device=passes.device)
        for a, b, delta in self.pairs if self.lamb > 0 else []:
            left, right = (passes.weights[i].detach().requires_grad_() for i in (b, a))
            term = self.lamb * times * distance(right, left, delta)
            for i, own in zip((b, a), torch.autograd.grad(term, (left, right)), strict=True):
                gradient[i] += own
            penalty += term.detach()
        return Descent(loss, gradient, {"asft/penalty": penalty.item()})


def distance(a: Tensor, b: Tensor, delta: Delta | None) -> Tensor:
    """||(I - C) B A||_F^2 of A [r, in] and B [out, r], through r x r products; C is 0 without a delta."""
    with unmixed(b.device):  # in bfloat16 a sum of squares may come out below 0
        left = b - delta.project(b) if delta is not None else b
        return ((left.T @ left) * (a @ a.T)).sum()
