"""Ranks of a run: `is_rank_zero` before they connect, `on_rank_zero` for work whose result the others wait for."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

from lisa_lightning.runtime.errors import UserError

T = TypeVar("T")


def is_rank_zero() -> bool:
    """Return whether this process will be rank zero, by the variables that launchers set before the ranks connect."""
    if "RANK" in os.environ:
        # torchrun numbers the ranks by itself, whatever started it.
        return int(os.environ["RANK"]) == 0
    return all(int(os.environ.get(name, "0")) == 0 for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def is_first_of_node() -> bool:
    """Return whether this process reports errors for its node, by the variables that launchers set."""
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return int(local) == 0


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
