"""The interface of a selection of alignment rows: `Selector`, and its inputs `Candidates`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Annotated, final

from pydantic import AfterValidator, Field
from torch import Tensor

from lisa_lightning.config.fields import MAX_COUNT, Words
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.curate._progress import Progress
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Packing
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.runtime.errors import UserError


def _check_keep(keep: float) -> float:
    if keep > 1 and keep % 1:
        raise ValueError("neither a share nor a number of rows")
    return keep


Keep = Annotated[
    float | int,
    Field(gt=0, le=MAX_COUNT),
    AfterValidator(_check_keep),
    Words("a share above 0, up to 1, or a whole number of rows above 1"),
]
"""Share of the rows to keep, or their number."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Inputs of a selector. Rows are encoded on access, and the model is loaded on call."""

    alignment: Examples
    """The candidate rows."""
    defender: Examples
    """Harmful rows of the provider; may be empty."""
    make_model: Callable[[], tuple[Backprop, Packing]]
    """Returns a fresh adapter on the base model, and the packing of its rows."""
    progress: Progress | None = None
    """File from which an interrupted selection continues; None for a selection that starts again."""


class Selector(ABC):
    """A selection of the alignment rows of highest score. Subclasses are frozen dataclasses of settings.

    Among equal scores the first rows are selected. A larger share contains the rows of a smaller one.
    """

    keep: float
    """Share of the rows to keep, or their number if above 1; 1 keeps all, whatever their scores."""

    @property
    def requirements(self) -> Set[Requirement]:
        """Requirements on the config."""
        return frozenset()

    @abstractmethod
    def scores(self, candidates: Candidates) -> Tensor:
        """Return the scores of the N alignment rows, [N], equal on all ranks.

        The model's weights must be unchanged afterwards.

        Raises:
            UserError: if required rows are missing, or a loss is not finite.
        """

    @final
    def count(self, size: int) -> int:
        """Return the number of rows kept of `size` rows.

        Raises:
            UserError: if `keep` is a number above `size`, or if `keep * size` rounds to zero.
        """
        count = int(self.keep) if self.keep > 1 else round(self.keep * size)
        if count > size:
            raise UserError(
                f"curate.keep={count}: there are only {size} alignment rows. "
                f"Fix: curate.keep={size} or less, or a share up to 1"
            )
        if not count:
            raise UserError(
                f"curate.keep={self.keep}: keeps none of the {size} alignment rows. Fix: a larger curate.keep"
            )
        return count

    @final
    def selected_rows(self, scores: Sequence[float]) -> list[int]:
        """Return the indices of the selected rows in ascending order.

        Raises:
            UserError: if no row is selected.
        """
        # The sort is stable: of equal scores the first are selected.
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
        return sorted(ranked[: self.count(len(scores))])
