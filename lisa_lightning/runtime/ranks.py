"""What only the first process of a run does, while the others wait for what came of it."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from lisa_lightning.runtime.errors import UserError

T = TypeVar("T")


class RankLostError(UserError):
    """Error for a process of the run that has ended or hangs.

    Args:
        rank: its number.
        sentence: what a person reads.
        by: the rank that raises it.
    """

    def __init__(self, rank: int, sentence: str, by: int) -> None:
        super().__init__(sentence)
        self.rank = rank
        self.is_reported = by == (1 if rank == 0 else 0)
        """Whether this rank prints the sentence: the first one does, unless it is the one that is lost."""


class Ranks(Protocol):
    """The processes of a run, as Lightning's Fabric offers them."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first rank."""
        ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What rank `src` passes, on every rank."""
        ...

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        ...


class OneRank:
    """The only process there is."""

    is_global_zero = True

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """It is here already."""
        return obj

    def barrier(self, name: str | None = None) -> None:
        """Nobody to wait for."""


def by_first(ranks: Ranks, act: Callable[[], T]) -> T:
    """What `act` gives on the first rank, on all of them.

    Raises:
        UserError: the first rank's, on all of them: those that went on would wait for it in vain.
    """
    found, trouble = None, None
    if ranks.is_global_zero:
        try:
            found = act()
        except UserError as error:
            trouble = str(error)
    found, trouble = ranks.broadcast((found, trouble))
    if trouble is not None:
        raise UserError(trouble)
    return found
