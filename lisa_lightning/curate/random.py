"""Rows drawn at random: the control that every other choice must beat at the same number of rows."""

from typing import final

import torch
from torch import Tensor

from lisa_lightning.curate.base import Candidates, Curate


@final
class Random(Curate):
    """Scores drawn from 0..1; no pass through the model.

    Args:
        keep: share of the rows to keep, 0..1.
        seed: of the draw.
    """

    def __init__(self, keep: float, seed: int) -> None:
        super().__init__(keep)
        self.seed = seed

    def scores(self, given: Candidates) -> Tensor:
        """Uses nothing but the number of rows."""
        return torch.rand(len(given.alignment), generator=torch.Generator().manual_seed(self.seed))
