"""Vaccine: alignment under the worst small drift of the hidden embeddings, so that later drift does less."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import attention_blocks, perturbed, probed
from lisa_lightning.objective.backprop import Descent, Passes

EPSILON = 1e-7  # beside the norm, as in the official code
Perturbation = list[list[Tensor]]
"""For each micro-batch, for each block: what is added to its output."""


@final
class Vaccine(Method):
    """min_w max_{||eps|| <= rho} L(w, e + eps) over the outputs e of the attention blocks (Huang et al., NeurIPS 2024).

    Two forward and two backward passes a step: the first finds g_l = dL/de_l, the second descends with
    eps_l = rho * g_l / ||(g_1, ..., g_L)||, one norm over all layers (Algorithm 1). The step's rows count as one batch
    whatever its micro-batches and ranks; both passes draw the same dropout masks (the official code draws two, and
    its accumulation of gradients clears them).

    Args:
        rho: the perturbation's norm, >= 0; 0 is SFT on alignment rows. The paper's is 2.
    """

    rows_apart = frozenset({"alignment"})

    def __init__(self, rho: float) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
        self.rho = rho
        self.blocks: list[nn.Module] = []

    def prepare(self, passes: Passes) -> None:
        """Find the blocks."""
        self.blocks = attention_blocks(passes.model)

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss under the perturbation."""
        loss, gradient = perturbed_gradient(passes, step.main, self.blocks, self.rho)
        return Descent(loss, gradient)


def perturbed_gradient(
    passes: Passes, batch: Batch, blocks: Sequence[nn.Module], rho: float, weights: Sequence[Tensor] | None = None
) -> tuple[float, list[Tensor]]:
    """The batch's mean loss under its worst perturbation of norm `rho` of the blocks' outputs, and its gradient."""
    found = output_gradients(passes, batch, blocks)
    squares = [g.float().square().sum() for micro in found for g in micro]
    whole = torch.stack([torch.zeros((), device=passes.device), *squares]).sum()
    scale = rho / (passes.summed([whole])[0].sqrt() + EPSILON)
    offsets = iter([[scale * g for g in micro] for micro in found])
    share = passes.mean_loss(batch)

    def moved(packs: Sequence[Pack]) -> Tensor:
        with perturbed(blocks, next(offsets)):
            return share(packs)

    return passes.gradient(batch, moved, weights)


def output_gradients(passes: Passes, batch: Batch, blocks: Sequence[nn.Module]) -> Perturbation:
    """The gradient of the batch's mean loss by each block's output, for each of this rank's micro-batches."""
    share = passes.mean_loss(batch)
    found: Perturbation = []
    for packs in passes.micro_batches(batch):
        with probed(blocks) as zeros:
            loss = share(packs)
        found.append(list(torch.autograd.grad(loss, zeros)))
    return found
