"""The proximal term rho/2 * ||w - anchor||^2 over a list of tensors, and its gradient."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lisa_lightning.data.interleave import Step
from lisa_lightning.objective.backprop import Backprop, StepOutput


def snapshot(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return an anchor: detached float32 copies of the weights."""
    return [weight.detach().to(torch.float32, copy=True) for weight in weights]


@torch.no_grad()
def squared_distance(weights: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    """Return the drift ||w - anchor||^2, summed over all tensors, as a float32 scalar.

    It is a sum of squares, because the square of a norm overflows in half precision from norm 256 on.
    """
    return torch.stack([d.square().sum() for d in _differences(weights, anchor)]).sum()


@torch.no_grad()
def add_gradient(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], anchor: Sequence[Tensor], rho: float
) -> Tensor:
    """Add rho * (w - anchor) to the gradients in place, and return the penalty rho/2 * ||w - anchor||^2.

    The result equals the gradient of the penalty as a term of the loss, at the cost of one pass over the weights. Call
    it after the last backward pass and before clipping.
    """
    squares = []
    for gradient, difference in zip(gradients, _differences(weights, anchor), strict=True):
        gradient.add_(difference, alpha=rho)
        squares.append(difference.square().sum())
    return torch.stack(squares).sum() * (rho / 2)


def proximal_gradient(backprop: Backprop, step: Step, anchor: Sequence[Tensor], rho: float, start: float) -> StepOutput:
    """Return the gradient of loss(w) + rho/2 * ||w - anchor||^2 (Lisa, Algorithm 2).

    Args:
        backprop: the weights w and their gradients.
        step: the batches of the step.
        anchor: float32 copies of the weights at the last switch.
        rho: proximal factor, >= 0.
        start: step after which the penalty applies; until then it is zero.
    """
    loss, gradients = backprop.gradient(step.main)
    applies = rho > 0 and step.index > start
    penalty = add_gradient(gradients, backprop.weights, anchor, rho).item() if applies else 0.0
    return StepOutput(loss, gradients, {"proximal/penalty": penalty})


def _differences(weights: Sequence[Tensor], anchor: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield w - anchor of each tensor. All of them together would be a copy of a model."""
    for weight, start in zip(weights, anchor, strict=True):
        yield weight.detach().float() - start
