"""Pharmacist, reconstructed: rows are kept that a model trained against harmful answers finds easy."""

from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, PositiveShare, Share
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.curate._selector import BilevelSelector
from lisa_lightning.curate.base import Candidates
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class Pharmacist(BilevelSelector):
    """A reconstruction of Pharmacist (Liu et al., arXiv 2510.10085) from its abstract alone. Scores are weights p.

    From the abstract: a trained selector ranks the alignment rows. Rows of high quality that are critical to safety
    rank high, others low. Any alignment-stage defense trains on the top rows.

    Choices of this reconstruction, checked against neither paper nor code:
        - The selector is SEAL's.
        - Harmful rows of the provider define "critical to safety". The abstract does not mention such rows.
        - The upper level minimizes u(l) = -log(1 - exp(-l)), with l the mean loss of a harmful row. It makes harmful
          answers unlikely. (-l has no lower bound.)
        - All numbers.

    Its results do not measure the published method.
    """

    keep: PositiveShare = 0.4
    """Share of the rows to keep. The abstract has none; it reports 57 % less training time."""
    upper_weight: Share = 0.9
    """c in the first epoch. With 1 the first epoch would only unlearn, so it starts lower."""
    upper_decay: Share = 0.1
    """Decrease of c per epoch, down to 0."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider."""
        return frozenset({"defender_rows"})

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the weights of the alignment rows, from these rows, the harmful rows and the model.

        Raises:
            UserError: if there is no harmful row, or a loss is not finite.
        """
        if not len(candidates.defender):
            raise UserError(
                "curate=pharmacist: needs defender rows, and source.defender has none. "
                "Fix: add harmful rows to source.defender"
            )
        backprop, packing = candidates.make_model()
        return self.fit_weights(backprop, packing, candidates.alignment, candidates.defender, unlikelihood)


def unlikelihood(losses: Tensor) -> Tensor:
    """Return -log(1 - exp(-l)) of mean losses l, [R]: above 0, and smaller for less likely answers."""
    return -torch.log(-torch.expm1(-losses))
