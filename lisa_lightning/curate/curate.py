"""What a choice of alignment rows is given and gives back, and how scores become a choice."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Packing
from lisa_lightning.errors import UserError
from lisa_lightning.needs import Need
from lisa_lightning.passes import Passes


@dataclass(frozen=True, slots=True)
class Candidates:
    """What scoring may use. Rows are encoded, and the model made, when they are called for."""

    alignment: Examples
    """The rows to choose from."""
    harmful: Examples
    """Harmful rows of the provider's; may be none."""
    trainee: Callable[[], tuple[Passes, Packing]]
    """A fresh adapter on the base model, where it is to be computed, and how that model takes its rows."""


@dataclass(frozen=True, slots=True)
class Curated:
    """A choice of rows, and how it came about."""

    kept: tuple[int, ...]
    """The places of the rows to train on, in the rows' own order."""
    scores: tuple[float, ...]
    """Of all rows, the better the higher; what they are of is the class's to say."""


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
    def curate(self, given: Candidates) -> Curated:
        """The choice.

        Raises:
            UserError: see `scores`; or no row is left.
        """
        size = len(given.alignment)
        count = round(self.keep * size)
        if not count:
            raise UserError(f"curate.keep={self.keep} leaves none of the {size} alignment rows")
        scores = self.scores(given).float().cpu()
        best = scores.argsort(descending=True, stable=True)[:count]
        return Curated(tuple(sorted(best.tolist())), tuple(scores.tolist()))
