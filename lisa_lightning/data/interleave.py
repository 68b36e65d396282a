"""Batch t as a pure function of (seed, t): position arithmetic into per-epoch permutations of each stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from lisa_lightning.data.packing import Example, Pack, Packing
from lisa_lightning.schedule import Schedule, State

STREAMS: tuple[State, ...] = ("alignment", "user")


@dataclass(slots=True)
class Step:
    """What one optimizer step trains on, as one rank sees it."""

    index: int
    state: State
    micro_batches: list[list[Pack]]
    """This rank's share; each micro-batch as the packs that hold it."""
    tokens: int
    """Supervised tokens of the whole step, over micro-batches and ranks: what the step's loss is the mean over."""
    unlabelled: int = 0
    """Rows of the whole step without a supervised token: they count for nothing."""

    def to(self, device: torch.device | str, **kwargs: Any) -> "Step":
        """The same step on another device (called by Lightning's batch transfer)."""
        moved = [[p.to(device, **kwargs) for p in micro] for micro in self.micro_batches]
        return replace(self, micro_batches=moved)


class StepBatches(Dataset[Step]):
    """Item t is the batch of optimizer step t.

    The k-th step in a state takes the k-th run of `batch_size * accumulate * world` positions of that stream; position
    i stands for row i mod N of the permutation of epoch i div N. Ranks and micro-batches are offsets in the run, so
    any split of the same total draws the same rows.

    Args:
        streams: the examples of each stream, by index (called lazily: nothing here grows with their number but the
            permutation).
        packing: how a micro-batch becomes packs.
        discard: draw user rows during alignment steps too and throw them away, as the official code does.
    """

    def __init__(
        self,
        streams: Mapping[State, "Examples"],
        packing: Packing,
        schedule: Schedule,
        total_steps: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        discard: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.streams = streams
        self.packing = packing
        self.schedule = schedule
        self.total_steps = total_steps
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.seed = seed
        self.discard = discard
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, t: int) -> Step:
        state = self.schedule.state(t)
        draw = t if state == "user" and self.discard else self.schedule.steps_in(state, t)
        size = self.batch_size * self.accumulate * self.world
        examples = self.streams[state]
        chosen = [examples[self._row(state, draw * size + i)] for i in range(size)]
        first = self.rank * self.batch_size * self.accumulate
        own = chosen[first : first + self.batch_size * self.accumulate]
        micro = [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]
        supervised = [e.supervised for e in chosen]
        return Step(t, state, [self.packing(m) for m in micro], sum(supervised), supervised.count(0))

    def _row(self, state: State, position: int) -> int:
        epoch, offset = divmod(position, len(self.streams[state]))
        return int(_permutation(self.seed, STREAMS.index(state), epoch, len(self.streams[state]))[offset])


@lru_cache(maxsize=8)
def _permutation(seed: int, stream: int, epoch: int, length: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, epoch]).permutation(length)


class Examples:
    """Rows that are encoded when they are asked for."""

    def __init__(self, rows: Sequence[Any], encode: Callable[[Any], Example]) -> None:
        self.rows = rows
        self.encode = encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.encode(self.rows[index])
