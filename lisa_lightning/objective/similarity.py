"""Similarity of rows to reference rows: `mean_cosines` of representations, `gradient_cosines` of gradients."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lisa_lightning.data.interleave import Batch
from lisa_lightning.data.packing import Example, pad
from lisa_lightning.objective.backprop import Backprop, norm


def mean_cosines(candidates: Tensor, references: Tensor) -> Tensor:
    """Return the mean cosine of each candidate to the references, [N] in float64.

    Args:
        candidates: representations, [N, d].
        references: representations, [M, d].
    """
    return normalize(candidates.double(), dim=1) @ normalize(references.double(), dim=1).mean(0)


def gradient_cosines(backprop: Backprop, candidates: Iterable[Example], references: Iterable[Example]) -> Tensor:
    """Return the cosine of each candidate's gradient to the mean gradient of the references, [N] in float64.

    A row's gradient is that of its mean loss over the label tokens, without dropout. It costs 1F 1B for each row, and
    the memory of two gradients. Every rank must call it, and computes all rows.

    Args:
        backprop: the model with its trainable weights.
        candidates: N rows. One without a label token has the cosine -1.
        references: M rows. Those without a label token do not count.
    """
    with backprop.no_dropout():
        mean = [torch.zeros_like(weight) for weight in backprop.weights]
        for row in references:
            for total, gradient in zip(mean, _row_gradient(backprop, row), strict=True):
                total += gradient
        length = norm(mean)
        cosines = []
        for row in candidates:
            gradients = _row_gradient(backprop, row)
            product = torch.stack([(g * m).sum() for g, m in zip(gradients, mean, strict=True)]).sum()
            lengths = norm(gradients) * length
            cosines.append(float(product / lengths) if lengths > 0 else -1.0)
    return torch.tensor(cosines, dtype=torch.float64)


def _row_gradient(backprop: Backprop, row: Example) -> list[Tensor]:
    """Return the gradient of a row's mean loss, times the number of ranks. In float16 an overflow is repeated."""
    packs = [packed.to(backprop.device) for packed in pad([row])]
    batch = Batch("user", [packs], tokens=sum(len(packed.targets) for packed in packs))
    while True:
        result = backprop.skip_on_overflow(lambda: backprop.gradient(batch))
        if result is not None:
            return result[1]
