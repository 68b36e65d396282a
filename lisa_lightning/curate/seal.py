"""SEAL on alignment rows: those are kept that a model trained on the others finds easy."""

from typing import final

import numpy as np
import torch
from torch import Tensor

from lisa_lightning.curate._selector import BilevelCurate
from lisa_lightning.curate.base import Candidates
from lisa_lightning.data.interleave import Examples
from lisa_lightning.runtime.errors import UserError


@final
class SEAL(BilevelCurate):
    """SEAL's selector (Shen et al., ICLR 2025) with held-out alignment rows as the safe set. Scores are weights p.

    SEAL chooses among the user's rows and has a safe set that is trusted. Here the candidates are the alignment rows,
    and nothing safer is at hand than these rows themselves: the seed cuts them into halves, and each half is chosen
    from with the other as upper rows, in two trainings that both start at the fresh adapter. So every row has a score
    (in the mean 1 in each half, with softmax) at the price of one training. What it finds are rows at odds with most
    others, not rows that matter for safety.

    Further departures of the official code: an epoch is a pass over the candidates, where that one ends with the
    shorter set; the model is the base model with the aligning's adapter, where that one's is an aligned model; the
    number of kept rows is rounded, where that one cuts off.

    Args: those of `BilevelCurate`.
    """

    def scores(self, given: Candidates) -> Tensor:
        """Uses the alignment rows and the model."""
        rows, size = given.alignment, len(given.alignment)
        if size < 2:
            raise UserError(f"curate=seal holds half of the alignment rows against the other, and there is only {size}")
        passes, packing = given.trainee()
        order = np.random.default_rng([self.seed, 0]).permutation(size).tolist()
        halves = order[: size // 2], order[size // 2 :]
        first, second = (Examples([rows.rows[i] for i in half], rows.encode) for half in halves)
        found = torch.zeros(size, device=passes.device)
        found[halves[0]] = self.trained(passes, packing, first, second, lambda losses: losses)
        found[halves[1]] = self.trained(passes, packing, second, first, lambda losses: losses)
        return found
