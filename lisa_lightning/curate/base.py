"""What a choice of alignment rows is given and gives back, and how scores become a choice."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lisa_lightning.config.requirements import Need
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Packing
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Candidates:
    """What scoring may use. Rows are encoded, and the model made, when they are called for."""

    alignment: Examples
    """The rows to choose from."""
    defender: Examples
    """Harmful rows of the provider's; may be none."""
    trainee: Callable[[], tuple[Passes, Packing]]
    """A fresh adapter on the base model, where it is to be computed, and how that model takes its rows."""


class Curate(ABC):
    """Keeps the alignment rows of highest score; of equal scores the first.

    Args:
        keep: share of the rows to keep, 0..1; 1 keeps all, whatever their scores. A larger share contains a smaller
            one's rows.
    """

    needs: Set[Need] = frozenset()
    """What it can't do without."""

    def __init__(self, keep: float) -> None:
        self.keep = keep

    @abstractmethod
    def scores(self, given: Candidates) -> Tensor:
        """[N] of the N alignment rows, equal on all ranks. The model's weights are what they were afterwards.

        Raises:
            UserError: there aren't the rows that it needs, or a loss is not finite.
        """

    @final
    def count(self, size: int) -> int:
        """How many of `size` rows are kept.

        Raises:
            UserError: none.
        """
        count = round(self.keep * size)
        if not count:
            raise UserError(f"curate.keep={self.keep} leaves none of the {size} alignment rows")
        return count

    @final
    def kept(self, scores: Sequence[float]) -> list[int]:
        """The places of the rows to train on, in the rows' own order."""
        best = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: of equal scores the first
        return sorted(best[: self.count(len(scores))])
