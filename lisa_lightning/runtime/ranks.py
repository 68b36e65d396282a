"""Work that only rank zero does while the other ranks wait for the result: `on_rank_zero`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from lisa_lightning.runtime.errors import UserError

T = TypeVar("T")


class RankLostError(UserError):
    """Error for a process of the run that has ended or hangs.

    Args:
        rank: the lost rank.
        message: error message for the user.
        raised_by: the rank that raises the error.
    """

    def __init__(self, rank: int, message: str, raised_by: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.is_reported = raised_by == (1 if rank == 0 else 0)
        """True if this rank prints the message: rank zero does, or rank one if rank zero is lost."""


class Ranks(Protocol):
    """Processes of a run, with the interface of Lightning's Fabric."""

    @property
    def is_global_zero(self) -> bool:
        """True if this process is rank zero."""
        ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`, on every rank."""
        ...

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        ...


class OneRank:
    """Ranks of a run with a single process."""

    is_global_zero = True

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return `obj`."""
        return obj

    def barrier(self, name: str | None = None) -> None:
        """Return at once."""


class OneProcess(OneRank):
    """Interface of Lightning's Fabric that an evaluation needs, for one process."""

    world_size = 1
    global_rank = 0

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context without effect. A surrounding `torch.autocast` remains active."""
        return nullcontext()


def on_rank_zero(ranks: Ranks, function: Callable[[], T]) -> T:
    """Call a function on rank zero, and return its result on all ranks.

    Raises:
        UserError: on all ranks, if the function raises it on rank zero. Otherwise the other ranks would wait forever.
    """
    result, error_message = None, None
    if ranks.is_global_zero:
        try:
            result = function()
        except UserError as error:
            error_message = str(error)
    result, error_message = ranks.broadcast((result, error_message))
    if error_message is not None:
        raise UserError(error_message)
    return result
