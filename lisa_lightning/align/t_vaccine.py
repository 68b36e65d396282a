"""T-Vaccine: Vaccine on a few layers at a time, drawn by how much harmful rows move them."""

from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from lisa_lightning.align.vaccine import output_gradients, perturbed_gradient
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Draw, Schedule, Stream
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import attention_blocks, decoder_layers
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.runtime.errors import UserError


@final
class TVaccine(Method):
    """Vaccine's perturbation of, and training of, `active_layers` layers at a time (Liu et al., 2024, Algorithm 1).

    Every `probability_steps` steps one harmful row gives each layer its probability ||g_l|| / sum ||g||, g_l being the
    gradient at its attention block's output; every `interval_steps` steps the active layers are drawn without
    replacement. Two forward and two backward passes a step, the backward ones down to the lowest active layer, and now
    and then one of each over the harmful row. Weights in other layers' attention have no gradient at all, so that AdamW
    neither moves nor decays them nor counts the step; adapters on MLPs train from the lowest active layer upwards. The
    official code draws layers from NumPy's global state, on each rank another's, and loses its place among the harmful
    rows once they are through; in a model of more than 26 layers it runs the layer below each active one with gradients
    too, so that an adapter on the MLP there may train, which is left out here. (It calls this "lisa", after another
    LISA, layerwise importance sampling.)

    Args:
        rho: the perturbation's norm, >= 0. The official README's is 3.
        active_layers: layers at a time; all of them are Vaccine. The official README's is 8.
        interval_steps: steps between two draws; the official README's are 20.
        probability_steps: steps between two harmful rows; the official README's are 200.
        seed: of the draws.
    """

    needs = frozenset({"defender rows"})
    rows_apart = frozenset({"alignment"})

    def __init__(self, rho: float, active_layers: int, interval_steps: int, probability_steps: int, seed: int) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
        self.rho = rho
        self.active_layers = active_layers
        self.interval_steps = interval_steps
        self.probability_steps = probability_steps
        self.seed = seed
        self.blocks: list[nn.Module] = []
        self.layers: list[set[int]] = []
        """For each layer the ids of all its weights; `attention` has those of its attention."""
        self.attention: list[set[int]] = []

    def draws(self, step: int) -> dict[Stream, Draw]:
        """Alignment rows, and at times one harmful row."""
        if step % self.probability_steps:
            return {"alignment": Draw(step)}
        return {"alignment": Draw(step), "defender": Draw(step // self.probability_steps, rows=1)}

    def prepare(self, passes: Passes) -> None:
        """Find the blocks.

        Raises:
            UserError: there are fewer layers than shall be active.
        """
        self.blocks = attention_blocks(passes.model)
        if self.active_layers > len(self.blocks):
            raise UserError(
                f"align.method.active_layers={self.active_layers} is not allowed; the model has {len(self.blocks)}"
            )
        self.attention = [{id(w) for w in block.parameters()} for block in self.blocks]
        self.layers = [{id(w) for w in layer.parameters()} for layer in decoder_layers(passes.model)]
        self.kept["probability"] = [torch.full((len(self.blocks),), 1 / len(self.blocks))]
        self.kept["active"] = [torch.arange(self.active_layers)]

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss under the perturbation of the active layers; None for the weights of the others."""
        metrics = {}
        if "defender" in step.batches:
            found = output_gradients(passes, step.batches["defender"], self.blocks)
            squares = torch.stack([sum_of_squares(found, i, passes.device) for i in range(len(self.blocks))])
            norms = passes.summed([squares])[0].sqrt()
            if norms.sum() > 0:  # a row whose answer is cut off says nothing
                self.kept["probability"] = [norms / norms.sum()]
            metrics = {f"t_vaccine/norm_{i}": value for i, value in enumerate(norms.tolist())}
        if step.index % self.interval_steps == 0:
            self.kept["active"] = [self.drawn(step.index)]
        active = self.kept["active"][0].tolist()
        trained = [self._trains(w, active) for w in passes.weights]
        weights = [w for w, on in zip(passes.weights, trained, strict=True) if on]
        for w, on in zip(passes.weights, trained, strict=True):
            w.requires_grad_(on)
        try:
            loss, own = perturbed_gradient(passes, step.main, [self.blocks[i] for i in active], self.rho, weights)
        finally:
            for w in passes.weights:
                w.requires_grad_(True)
        rest = iter(own)
        return Descent(loss, [next(rest) if on else None for on in trained], metrics)

    def drawn(self, step: int) -> Tensor:
        """The layers that are active from this step on: the same on every rank and after a resume."""
        chances = self.kept["probability"][0].double().cpu().numpy()
        draw = np.random.default_rng([self.seed, step])
        found = draw.choice(len(chances), self.active_layers, replace=False, p=chances / chances.sum())
        return torch.from_numpy(np.sort(found))

    def _trains(self, weight: Tensor, active: list[int]) -> bool:
        for i, (layer, attention) in enumerate(zip(self.layers, self.attention, strict=True)):
            if id(weight) in attention:
                return i in active
            if id(weight) in layer:
                return i >= min(active)
        return True


def sum_of_squares(found: list[list[Tensor]], block: int, device: torch.device) -> Tensor:
    """Of one block's gradients over micro-batches."""
    own = [micro[block].float().square().sum() for micro in found]
    return torch.stack([torch.zeros((), device=device), *own]).sum()
