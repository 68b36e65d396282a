"""T-Vaccine: Vaccine on a few layers at a time, sampled by the gradient norm of harmful rows."""

from typing import final

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.align.base import Aligner
from lisa_lightning.align.vaccine import output_gradients, perturbed_gradient
from lisa_lightning.config.fields import STRICT, Count, NonNegative, Seed
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class TVaccine(Aligner):
    """Perturb and train `active_layers` layers at a time, as Vaccine does (Liu et al., 2024, Algorithm 1).

    Every `probability_steps` steps one harmful row gives each layer the probability

        ||g_l|| / sum_k ||g_k||

    where g_l is the gradient with respect to the output of the layer's attention block. Every `interval_steps` steps
    the active layers are drawn without replacement.

    Two forward and two backward passes a step; the backward passes end at the lowest active layer. Sampling costs one
    more of each. Attention weights of inactive layers have no gradient, so that AdamW neither moves nor decays them.
    Adapters on MLPs train from the lowest active layer upwards. Under `16-mixed` a skipped step draws nothing: layers
    and probabilities stay those before it.

    Departures from the official code:
        - It draws layers from NumPy's global state, differently on each rank.
        - It loses its position among the harmful rows after their last one.
        - In a model of more than 26 layers it also runs the layer below each active one with gradients, so that an
          adapter on its MLP may train.
        - It calls the method "lisa", after layerwise importance sampling.
    """

    rho: NonNegative = 3.0
    """Norm of the perturbation. The official README has 3."""
    active_layers: Count = 8
    """Number of active layers; all layers are Vaccine. The official README has 8."""
    interval_steps: Count = 20
    """Steps between two draws of active layers. The official README has 20."""
    probability_steps: Count = 200
    """Steps between two harmful rows; with 100 steps only the first has one. The official README has 200."""
    seed: Seed = 0
    """Seed of the draws."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider."""
        return frozenset({"defender_rows"})

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """The alignment rows, since each has a perturbation of its own."""
        return frozenset({"alignment"})

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of alignment rows, and in some steps one harmful row."""
        if step % self.probability_steps:
            return {"alignment": StreamBatch(step)}
        return {"alignment": StreamBatch(step), "defender": StreamBatch(step // self.probability_steps, size=1)}

    def init(self, backprop: Backprop) -> State:
        """Return the state: equal probabilities, and the first layers active.

        Raises:
            UserError: if the model has fewer than `active_layers` layers, or a layer has no attention block.
        """
        layers = len(backprop.attention_blocks)
        if self.active_layers > layers:
            raise UserError(f"align.method.active_layers={self.active_layers} is not allowed; the model has {layers}")
        sampling = {
            "probability": [torch.full((layers,), 1 / layers)],
            "active": [torch.arange(self.active_layers)],
        }
        return super().init(backprop) | sampling

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss under the perturbation of the active layers.

        Weights of inactive layers get None.
        """
        update, metrics = self._sampled(backprop, step, state)
        active = (state | update)["active"][0].tolist()
        trains = _trained_weights(backprop, active)
        weights = [w for w, is_trained in zip(backprop.weights, trains, strict=True) if is_trained]
        blocks = [backprop.attention_blocks[layer] for layer in active]
        for weight, is_trained in zip(backprop.weights, trains, strict=True):
            weight.requires_grad_(is_trained)
        try:
            loss, gradients = perturbed_gradient(backprop, step.main, blocks, self.rho, weights)
        finally:
            for weight in backprop.weights:
                weight.requires_grad_(True)
        remaining = iter(gradients)
        return StepOutput(loss, [next(remaining) if is_trained else None for is_trained in trains], metrics, update)

    def _sampled(self, backprop: Backprop, step: Step, state: State) -> tuple[State, dict[str, float]]:
        """Return new probabilities and active layers where they are due, and the norms as metrics."""
        update: State = {}
        metrics: dict[str, float] = {}
        if "defender" in step.batches:
            layers = range(len(backprop.attention_blocks))
            gradients = output_gradients(backprop, step.batches["defender"], backprop.attention_blocks)
            squares = torch.stack([sum_of_squares(gradients, layer, backprop.device) for layer in layers])
            norms = backprop.all_reduce_sum([squares])[0].sqrt()
            if norms.sum() > 0:  # it is zero if the answer of the row is truncated
                update["probability"] = [norms / norms.sum()]
            metrics = {f"t_vaccine/norm_{i}": value for i, value in enumerate(norms.tolist())}
        if step.index % self.interval_steps == 0:
            update["active"] = [self.draw((state | update)["probability"][0], step.index)]
        return update, metrics

    def draw(self, probability: Tensor, step: int) -> Tensor:
        """Return the layers that are active from a step on; equal on every rank and after a resume.

        Args:
            probability: [layers], summing to 1.
            step: 0-based index of the step.
        """
        probabilities = probability.double().cpu().numpy()
        rng = np.random.default_rng([self.seed, step])
        size = len(probabilities)
        layers = rng.choice(size, self.active_layers, replace=False, p=probabilities / probabilities.sum())
        return torch.from_numpy(np.sort(layers))


def _trained_weights(backprop: Backprop, active: list[int]) -> list[bool]:
    """Return for each trainable weight whether it has a gradient."""
    attention = {id(w) for block in backprop.attention_blocks for w in block.parameters()}

    def trains(weight: Tensor, layer: int | None) -> bool:
        if layer is None:
            return True
        return layer in active if id(weight) in attention else layer >= min(active)

    return [trains(weight, layer) for weight, layer in zip(backprop.weights, backprop.layer_of, strict=True)]


def sum_of_squares(gradients: list[list[Tensor]], block: int, device: torch.device) -> Tensor:
    """Return the sum of squares of one block's gradients over all micro-batches, a float32 scalar."""
    squares = [micro_batch[block].float().square().sum() for micro_batch in gradients]
    return torch.stack([torch.zeros((), device=device), *squares]).sum()
