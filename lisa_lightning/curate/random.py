"""Random rows: the control that every other selector must beat at the same number of rows."""

from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Seed
from lisa_lightning.curate.base import Candidates, Keep, Selector


@final
@dataclass(frozen=True, config=STRICT)
class Random(Selector):
    """Draw scores uniformly from 0..1. No forward pass."""

    keep: Keep = 0.8
    """Share of the rows to keep, or their number if above 1."""
    seed: Seed = 0
    """Seed of the draw."""

    def scores(self, candidates: Candidates) -> Tensor:
        """Return random scores, from the number of rows alone."""
        return torch.rand(len(candidates.alignment), generator=torch.Generator().manual_seed(self.seed))
