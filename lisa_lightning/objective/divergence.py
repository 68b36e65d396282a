"""KL divergence between a model at its anchor weights and at its current ones. Start at `kl_to_anchor`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lisa_lightning.data.packing import Pack
from lisa_lightning.objective.backprop import Backprop

LogitsFn = Callable[[Any, Sequence[Pack]], Tensor]
"""Model, packs of a micro-batch -> the logits to compare, such as `loss.label_logits`."""


def kl_to_anchor(
    backprop: Backprop, anchor: Sequence[Tensor], packs: Sequence[Pack], logits_fn: LogitsFn, dim: int = -1
) -> tuple[Tensor, Tensor]:
    """Return KL(pi_0 || pi) of a micro-batch and the logits of pi; pi_0 is the model with the anchor weights.

    Two forward passes with the same dropout masks. Only the one of pi has a gradient.

    Args:
        backprop: the model, with the weights of pi.
        anchor: the trainable weights of pi_0.
        packs: packs of the micro-batch.
        logits_fn: returns the logits to compare.
        dim: dimension of the logits over which a distribution extends.

    Returns:
        The sum over all distributions as a float32 scalar, and what `logits_fn` returns for pi.
    """
    with backprop.reference_pass(anchor):
        reference = logits_fn(backprop.model, packs)
    logits = logits_fn(backprop.model, packs)
    return kl_divergence(reference, logits, dim), logits


def kl_divergence(reference: Tensor, logits: Tensor, dim: int = -1) -> Tensor:
    """Return the sum over all distributions of KL(softmax(reference) || softmax(logits)), as a float32 scalar.

    The sum of q - p is added, which is zero except for rounding. With it, value and gradient are exactly zero if both
    logits are equal.
    """
    log_p, log_q = (values.float().log_softmax(dim) for values in (reference, logits))
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q) + q - p).sum()
