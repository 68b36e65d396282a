"""LoX: alignment whose update is amplified in its leading directions after training."""

from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.align.base import Aligner
from lisa_lightning.config.fields import STRICT, Count, NonNegative
from lisa_lightning.model.factors import Factors, modules
from lisa_lightning.objective.backprop import State


@final
@dataclass(frozen=True, config=STRICT)
class LoX(Aligner):
    """Train on the alignment rows, then amplify the leading directions of the update (Perin et al., COLM 2025).

        W = W_aligned + coef * P_k(D),    D = W_aligned - W_base = alpha/r * B A

    where P_k(D) is the best approximation of D of rank k. With the k leading left singular vectors U of D, it is
    U U^T D. So only B changes, and rank and alpha/r stay:

        B <- B + coef * U U^T B

    One forward and one backward pass a step. At the end, one QR decomposition of each factor and the SVD of an r x r
    matrix per module, in float32. The memory is that of SFT.

    Departures from the official code:
        - `k: null` amplifies the whole update, as k = 0 does in the official code.
        - The official code rounds both models and their difference to bfloat16.
        - It amplifies the update of every matrix. An alignment adapter changes only its modules, and that of an
          embedding is not amplified.
    """

    k: Count | None = 6
    """Number of amplified directions of each module; None for all, as from the rank on. The paper has 6 for
    Llama-2-7B, as others quote it, and the official code all by default."""
    coef: NonNegative = 1.25
    """Factor of the added part; 0 is SFT on alignment rows. The paper has 1.25 for Llama-2-7B, as others
    quote it, and the official code 1 by default."""

    def finish(self, factors: Factors, state: State) -> Factors:
        """Return the adapter with the amplified update, `factors` itself for coef = 0."""
        if self.coef == 0:
            return factors
        pairs = modules(factors).values()
        return factors | {b: self._amplify(factors[a].float(), factors[b].float()) for a, b in pairs}

    def _amplify(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the new B of a module."""
        if self.k is None:
            return (1 + self.coef) * b
        # With B = Q R and A^T = Q' R' the singular vectors of B A are Q times those of R R'^T.
        basis, upper = torch.linalg.qr(b)
        core = upper @ torch.linalg.qr(a.T, mode="r").R.T
        leading = torch.linalg.svd(core, full_matrices=False).U[:, : self.k]
        return b + self.coef * (basis @ (leading @ (leading.T @ upper)))
