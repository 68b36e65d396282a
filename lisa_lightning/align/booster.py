"""Booster: alignment that also flattens how much a step towards harmful rows would gain."""

from typing import final

from torch import nn

from lisa_lightning.align.vaccine import EPSILON, perturbed_gradient
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Draw, Schedule, Stream
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import attention_blocks
from lisa_lightning.objective.backprop import Descent, Passes, norm


@final
class Booster(Method):
    """min_w f(w) + lambda * (h(w) - h(w - alpha * grad h(w) / ||grad h(w)||)) (Huang et al., ICLR 2025, Eq. 1 and 3).

    f is the loss on alignment rows, h that on harmful ones, as many a step (in the official code always 10). Three
    forward and three backward passes, four with `rho`; second derivatives are dropped as in the paper. All draw the
    same dropout masks (in the official code each draws its own).

    Args:
        lamb: lambda, >= 0; 0 is SFT on alignment rows. The paper's is 5 (its script for GSM8K has 25).
        alpha: length of the harmful step, >= 0; 0 is SFT too. The paper's is 0.1.
        rho: Vaccine's perturbation of f, >= 0; 0 leaves it out (the official option `perturb_aware`).
        add_back: undo the harmful step by adding it back, as the official code does, which leaves its rounding errors
            in the weights.
    """

    needs = frozenset({"defender rows"})

    def __init__(self, lamb: float, alpha: float, rho: float, add_back: bool) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
        self.lamb = lamb
        self.alpha = alpha
        self.rho = rho
        self.add_back = add_back
        self.rows_apart = frozenset({"alignment"} if rho > 0 else ())
        self.blocks: list[nn.Module] = []

    def draws(self, step: int) -> dict[Stream, Draw]:
        """Both streams."""
        return {"alignment": Draw(step), "defender": Draw(step)}

    def prepare(self, passes: Passes) -> None:
        """Find the blocks that Vaccine's perturbation needs."""
        self.blocks = attention_blocks(passes.model) if self.rho > 0 else []

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """grad f(w) + lambda * (grad h(w) - grad h(w'))."""
        harmful = step.batches["defender"]
        before, here = passes.gradient(harmful)
        length = self.alpha / (norm(here) + EPSILON)
        away = [w.detach() - length * g for w, g in zip(passes.weights, here, strict=True)]
        with passes.at(away):
            after, there = passes.gradient(harmful)
        if self.add_back:
            passes.move([w + length * g for w, g in zip(away, here, strict=True)])
        if self.rho > 0:
            loss, gradient = perturbed_gradient(passes, step.main, self.blocks, self.rho)
        else:
            loss, gradient = passes.gradient(step.main)
        combined = [f + self.lamb * (h - n) for f, h, n in zip(gradient, here, there, strict=True)]
        return Descent(loss, combined, {"defender/loss": before, "booster/reduction": before - after})
