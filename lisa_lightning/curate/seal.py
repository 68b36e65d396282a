"""SEAL on alignment rows: rows are kept that a model trained on the other half of them finds easy."""

from typing import final

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT
from lisa_lightning.curate._selector import BilevelSelector
from lisa_lightning.curate.base import Candidates
from lisa_lightning.data.interleave import Examples
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class SEAL(BilevelSelector):
    """SEAL's selector (Shen et al., ICLR 2025) with held-out alignment rows as the safe set. Scores are weights p.

    SEAL selects among the user's rows and has a trusted safe set. In this setting the candidates are the alignment rows
    themselves, and no safer rows exist. So the seed splits them into halves. Each half is scored with the other as
    upper rows, in two trainings that both start at the fresh adapter. Every row gets a score, at the cost of one
    training. With softmax the mean score is 1 in each half.

    The selector finds rows at odds with most others, not rows that matter for safety.

    Departures from the official code:
        - An epoch is a pass over the candidates. In the official code it ends with the shorter set.
        - The model is the base model with the adapter of alignment. In the official code it is an aligned model.
        - The number of kept rows is rounded. In the official code it is truncated.
    """

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the weights of the alignment rows, from these rows and the model.

        Raises:
            UserError: if there are fewer than two rows, or a loss is not finite.
        """
        rows, size = candidates.alignment, len(candidates.alignment)
        if size < 2:
            raise UserError(
                f"curate=seal: needs at least 2 alignment rows, one for each half, but there is only {size}. "
                "Fix: add rows to source.alignment"
            )
        backprop, packing = candidates.make_model()
        order = np.random.default_rng([self.seed, 0]).permutation(size).tolist()
        halves = order[: size // 2], order[size // 2 :]
        first, second = (Examples([rows.rows[i] for i in half], rows.encode) for half in halves)
        scores = torch.zeros(size, device=backprop.device)
        scores[halves[0]] = self.fit_weights(backprop, packing, first, second, lambda losses: losses)
        scores[halves[1]] = self.fit_weights(backprop, packing, second, first, lambda losses: losses)
        return scores
