"""Select alignment rows near the user's rows and unlike one another, by a determinantal point process: `DPP`."""

import math
from dataclasses import dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

JITTER: Final = 1e-6
"""Added to the kernel's diagonal. The official code has 1e-6."""
BLOCK_ROWS: Final = 1024
"""References that all candidates are compared with at once."""


@final
@dataclass(frozen=True, slots=True)
class DPP:
    """Greedy MAP selection of a determinantal point process (SPARD, ICML 2026).

    The kernel of N candidates is

        K_ij = q_i cos(i, j) q_j + 1e-6 [i = j],  q_i = (max_u cos(i, u))^power

    where i and j are candidates and u is a reference. Each step selects the row that raises log det K of the selection
    most. For k rows it takes O(N k) memory and O(N k (k + d)) time, where d is the size of an embedding. The official
    code stores all of K, and solves a triangular system at every step.
    """

    ratio: float
    """Rows to select, relative to the number of references."""
    power: int
    """Exponent of a row's relevance."""

    def count(self, candidates: int, references: int) -> int:
        """Return the number of rows to select: at least one, and at most all candidates."""
        return min(candidates, max(1, int(references * self.ratio)))

    def select(self, candidates: Tensor, references: Tensor) -> list[int]:
        """Return the indices of the selected candidates in the order of selection.

        Args:
            candidates: [N, d] embeddings.
            references: [M, d] embeddings.
        """
        directions = F.normalize(candidates.double(), dim=1)
        relevance = largest_cosines(directions, F.normalize(references.double(), dim=1)) ** self.power
        return greedy_map(relevance[:, None] * directions, self.count(len(candidates), len(references)))


def largest_cosines(candidates: Tensor, references: Tensor) -> Tensor:
    """Return the largest cosine of each candidate with any reference, [N].

    Args:
        candidates: [N, d] vectors of length 1.
        references: [M, d] vectors of length 1.
    """
    blocks = [(candidates @ block.T).amax(1) for block in references.split(BLOCK_ROWS)]
    return torch.stack(blocks).amax(0)


def greedy_map(features: Tensor, count: int) -> list[int]:
    """Return the rows that greedily maximize log det (F F^T + 1e-6 I), in the order of selection.

    An incremental Cholesky factorization keeps each row's conditional variance, given the rows selected before. It is
    at least 1e-6, which float64 resolves. In float32 the official code must lift smaller values. The first of
    equal rows is selected.

    Args:
        features: [N, d] float64, of length at most 1.
        count: number of rows to select, at most N.
    """
    variances = features.square().sum(1) + JITTER
    factors = features.new_zeros(count, len(features))
    selected: list[int] = []
    for step in range(count):
        index = int(variances.argmax())
        covariances = features @ features[index] - factors[:step, index] @ factors[:step]
        factors[step] = covariances / variances[index].sqrt()
        variances = variances - factors[step].square()
        selected.append(index)
        variances[selected] = -math.inf
    return selected
