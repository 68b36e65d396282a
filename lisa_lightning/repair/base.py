"""The interface of a defense after fine-tuning: `Repair`, its inputs `RepairInputs` and its result `RepairResult`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import Factors, adapted_embeddings, trainable
from lisa_lightning.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class RepairInputs:
    """Inputs of a repair. All but the factors are computed on call, since no repair needs everything.

    alpha/r is not included: all adapters here have that of the finished adapter, and no repair's result depends on it.
    """

    factors: Factors
    """The finished adapter."""
    net: Callable[[], Any]
    """The fine-tuned model, a `PeftModel`; the values of its adapter do not matter."""
    rows: Callable[[Stream], Iterable[Pack]]
    """All rows of a stream, padded."""
    deltas: Callable[[], Mapping[str, Delta]]
    """The alignment updates, by module."""
    alignment: Callable[[], Factors]
    """The alignment adapter. Its rank and modules may differ from those of the finished adapter."""
    reference: Callable[[], Factors]
    """A safe adapter with the same names and shapes."""


@dataclass(frozen=True, slots=True)
class RepairResult:
    """Result of a repair. Subclasses add how it was computed."""

    factors: Factors
    """The repaired adapter, for the same alpha/r. Tensors that the repair did not change are those of the input, not
    copies. If its rank is larger, the ranks of the input come first."""


class Repair(ABC):
    """A defense after fine-tuning. Subclasses are frozen dataclasses of settings."""

    @property
    def requirements(self) -> Set[Requirement]:
        """Requirements on the config."""
        return frozenset()

    def check(self, net: Any, deltas: Mapping[str, Delta]) -> None:  # noqa: B027 - most repairs accept any adapter
        """Check before training that an adapter can be repaired.

        Args:
            net: a model with the adapter of the run, without weights.
            deltas: the modules that alignment will change, with placeholder values.

        Raises:
            UserError: if the adapter cannot be repaired.
        """

    @abstractmethod
    def repair(self, inputs: RepairInputs) -> RepairResult:
        """Return the repaired adapter. The input factors and the model must be unchanged afterwards.

        Raises:
            UserError: if the adapter cannot be repaired with these inputs.
        """


def draw_modules(names: Iterable[str], count: int, seed: int) -> list[str]:
    """Return `count` of the modules, drawn at random: the control of a repair that selects modules."""
    ordered = sorted(names)
    drawn = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed))
    return [ordered[i] for i in drawn[:count].tolist()]


def refuse_embeddings(net: Any, choice: str) -> None:
    """Raise UserError if the adapter of an embedding would get another rank.

    Args:
        net: a model with an adapter.
        choice: the repair as `GROUP=NAME`, for the message.
    """
    if embeddings := adapted_embeddings(trainable(net)):
        raise UserError(
            f"{choice}: changes the rank of the adapter, which an embedding's adapter does not allow. "
            f"Fix: remove {embeddings[0]} from lora.targets"
        )
