"""The proximal term rho/2 * ||w - anchor||^2 over a list of tensors, and its gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lisa_lightning.data.interleave import Step
from lisa_lightning.objective.backprop import Descent, Passes


def snapshot(weights: Sequence[Tensor]) -> list[Tensor]:
    """An anchor: detached float32 copies of the weights."""
    return [w.detach().to(torch.float32, copy=True) for w in weights]


@torch.no_grad()
def squared_distance(weights: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    """||w - anchor||^2 summed over all tensors: the drift. A float32 scalar.

    Summed as squares, since the square of a norm overflows in half precision from norm 256 on.
    """
    return torch.stack([d.square().sum() for d in _differences(weights, anchor)]).sum()


@torch.no_grad()
def add_gradient(gradient: Sequence[Tensor], weights: Sequence[Tensor], anchor: Sequence[Tensor], rho: float) -> Tensor:
    """Add rho * (w - anchor) to the gradient, in place, and return the penalty rho/2 * ||w - anchor||^2.

    The same gradient as that of the penalty as a term of the loss, at the cost of one pass over the weights; it belongs
    after the last backward pass and before clipping.
    """
    difference = _differences(weights, anchor)
    for own, d in zip(gradient, difference, strict=True):
        own.add_(d, alpha=rho)
    return torch.stack([d.square().sum() for d in difference]).sum() * (rho / 2)


def pulled(passes: Passes, step: Step, anchor: Sequence[Tensor], rho: float, rests: float) -> Descent:
    """Descend the step's loss and, after step `rests`, the penalty rho/2 * ||w - anchor||^2 (Lisa, Algorithm 2)."""
    loss, gradient = passes.gradient(step.main)
    pulls = rho > 0 and step.index > rests
    penalty = add_gradient(gradient, passes.weights, anchor, rho).item() if pulls else 0.0
    return Descent(loss, gradient, {"proximal/penalty": penalty})


def _differences(weights: Sequence[Tensor], anchor: Sequence[Tensor]) -> list[Tensor]:
    return [w.detach().float() - a for w, a in zip(weights, anchor, strict=True)]
