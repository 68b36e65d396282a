"""Vaccine: alignment under the worst small perturbation of the hidden embeddings, against harmful embedding drift."""

from collections.abc import Sequence
from typing import Final, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from lisa_lightning.align.base import Aligner
from lisa_lightning.config.fields import STRICT, NonNegative
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.model.hooks import add_to_outputs, output_probes
from lisa_lightning.objective.backprop import Backprop, State, StepOutput

EPSILON: Final = 1e-7
"""Added to the norm, as in the official code."""


@final
@dataclass(frozen=True, config=STRICT)
class Vaccine(Aligner):
    """Descend max_{||eps|| <= rho} L(w, e + eps), e being attention outputs (Huang et al., NeurIPS 2024).

    Two forward and two backward passes a step (Algorithm 1). The first computes g_l = dL/de_l. The second descends with

        eps_l = rho * g_l / ||(g_1, ..., g_L)||

    where the norm is over all layers. All rows of the step count as one batch, whatever its micro-batches and ranks.
    Both passes draw the same dropout masks.

    Departures from the official code:
        - It draws two dropout masks, and its accumulation of gradients clears the perturbations.
    """

    rho: NonNegative = 2.0
    """Norm of the perturbation; 0 is SFT on alignment rows. The paper's value is 2."""

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """The alignment rows, since each has a perturbation of its own."""
        return frozenset({"alignment"})

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if a layer has no attention block."""
        _ = backprop.attention_blocks
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss under the perturbation."""
        return StepOutput(*perturbed_gradient(backprop, step.main, backprop.attention_blocks, self.rho))


def perturbed_gradient(
    backprop: Backprop, batch: Batch, blocks: Sequence[nn.Module], rho: float, weights: Sequence[Tensor] | None = None
) -> tuple[float, list[Tensor]]:
    """Return the mean loss of a batch under the worst perturbation of the blocks' outputs, and its gradients.

    Args:
        blocks: modules whose outputs are perturbed.
        rho: norm of the perturbation over all blocks, >= 0.
        weights: a subset of the trainable weights, by default all.
    """
    gradients = output_gradients(backprop, batch, blocks)
    squares = [gradient.float().square().sum() for micro_batch in gradients for gradient in micro_batch]
    total = torch.stack([torch.zeros((), device=backprop.device), *squares]).sum()
    scale = rho / (backprop.all_reduce_sum([total])[0].sqrt() + EPSILON)
    mean_loss = backprop.mean_loss(batch)

    def perturbed_loss(packs: Sequence[Pack], index: int) -> Tensor:
        with add_to_outputs(blocks, [scale * gradient for gradient in gradients[index]]):
            return mean_loss(packs, index)

    return backprop.gradient(batch, perturbed_loss, weights)


def output_gradients(backprop: Backprop, batch: Batch, blocks: Sequence[nn.Module]) -> list[list[Tensor]]:
    """Return the gradients of a batch's mean loss with respect to the blocks' outputs.

    Returns:
        One list for each of this rank's micro-batches that have a row, with one tensor for each block.
    """
    mean_loss = backprop.mean_loss(batch)
    gradients: list[list[Tensor]] = []
    for index, packs in enumerate(backprop.micro_batches(batch)):
        with output_probes(blocks) as probes:
            loss = mean_loss(packs, index)
        gradients.append(list(backprop.differentiate(loss, probes)))
    backprop.raise_on_overflow([gradient for micro_batch in gradients for gradient in micro_batch])
    return gradients
