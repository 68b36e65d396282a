"""Pharmacist, reconstructed: alignment rows are kept that a model turned away from harmful answers finds easy."""

from typing import final

import torch
from torch import Tensor

from lisa_lightning.curate._selector import BilevelCurate
from lisa_lightning.curate.base import Candidates
from lisa_lightning.runtime.errors import UserError


@final
class Pharmacist(BilevelCurate):
    """A reconstruction of Pharmacist (Liu et al., arXiv 2510.10085), of which we knew the abstract alone.

    From the abstract: a selector is trained that ranks the alignment rows, up those of high quality that are critical
    to safety, down the others; its top rows are what any alignment-stage defense trains on. Ours, neither checked
    against the paper nor its code: that the selector is SEAL's; that "critical to safety" is told by harmful rows of
    the provider's, which the abstract doesn't mention; that the upper level wants their answers unlikely,
    u(l) = -log(1 - exp(-l)) with l a harmful row's mean loss, since -l itself has no lower bound; and all numbers. Its
    results are no measurement of the published method.

    Scores are weights p.

    Args: those of `BilevelCurate`. With `upper_weight` 1 the first epoch does nothing but unlearn, so it starts below.
    """

    needs = frozenset({"defender rows"})

    def scores(self, given: Candidates) -> Tensor:
        """Uses the alignment rows, the defender rows and the model."""
        if not len(given.defender):
            raise UserError("curate=pharmacist needs defender rows (source.defender), and there are none")
        passes, packing = given.trainee()
        return self.trained(passes, packing, given.alignment, given.defender, unlikelihood)


def unlikelihood(losses: Tensor) -> Tensor:
    """[R] -log(1 - exp(-l)) of mean losses l [R]: the less likely an answer, the smaller, and never below 0."""
    return -torch.log(-torch.expm1(-losses))
