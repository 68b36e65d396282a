"""Batch t as a pure function of (seed, t): position arithmetic into per-epoch permutations of each stream."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from lisa_lightning.data.packing import Example, Pack, Packing, pad
from lisa_lightning.data.schedule import Draw, Stream
from lisa_lightning.runtime.errors import UserError


@dataclass(slots=True)
class Batch:
    """Rows of one stream, as one rank sees them."""

    stream: Stream
    micro_batches: list[list[Pack]]
    """This rank's share; each micro-batch as the packs that hold it."""
    tokens: int
    """Supervised tokens of the whole batch, over micro-batches and ranks: what its loss is the mean over."""
    unlabelled: int = 0
    """Rows of the whole batch without a supervised token: they count for nothing."""

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        """The same batch on another device."""
        moved = [[p.to(device, **kwargs) for p in micro] for micro in self.micro_batches]
        return replace(self, micro_batches=moved)


@dataclass(slots=True)
class Step:
    """What one optimizer step trains on, as one rank sees it."""

    index: int
    batches: dict[Stream, Batch]
    """The stream that the step is about comes first."""

    @property
    def main(self) -> Batch:
        """The batch that the step is about."""
        return next(iter(self.batches.values()))

    def to(self, device: torch.device | str, **kwargs: Any) -> "Step":
        """The same step on another device (called by Lightning's batch transfer)."""
        return Step(self.index, {name: batch.to(device, **kwargs) for name, batch in self.batches.items()})


class Draws(Protocol):
    """A method, as far as its data go."""

    rows_apart: Set[Stream]
    """Streams whose rows are padded, whatever the packing."""
    paired: bool
    """Row i of one stream belongs to row i of every other, so all are drawn in one order."""

    def draws(self, step: int) -> Mapping[Stream, Draw]:
        """What the step draws; the stream that it is about comes first."""
        ...


class StepBatches(Dataset[Step]):
    """Item t is the data of optimizer step t.

    The k-th step that draws from a stream takes the k-th run of `batch_size * accumulate * world` positions of it (or
    of as many as the draw says); position i stands for row i mod N of the permutation of epoch i div N. Ranks and
    micro-batches are offsets in the run, so any split of the same total draws the same rows.

    Args:
        streams: the examples of each stream, by index (called lazily: nothing here grows with their number but the
            permutation). A stream's place among them is part of its permutation's seed.
        packing: how a micro-batch becomes packs.
        method: says what each step draws, and of which streams rows must be padded.
        discard: draw user rows in alignment steps too and throw them away, as the official code does.
    """

    def __init__(
        self,
        streams: Mapping[Stream, "Examples"],
        packing: Packing,
        method: Draws,
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
        self.method = method
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
        return Step(t, {stream: self._batch(t, stream, draw) for stream, draw in self.method.draws(t).items()})

    def _batch(self, t: int, stream: Stream, draw: Draw) -> Batch:
        before = t if stream == "user" and self.discard else draw.before
        size = draw.rows or self.batch_size * self.accumulate * self.world
        examples = self.streams[stream]
        if not len(examples):
            raise UserError(f"{type(self.method).__name__} draws {stream} rows, and this stage has none")
        return self._shared_out(stream, [examples[self._row(stream, before * size + i)] for i in range(size)])

    def _shared_out(self, stream: Stream, chosen: Sequence[Example]) -> Batch:
        share = -(-len(chosen) // self.world)
        own = chosen[self.rank * share : (self.rank + 1) * share]
        micro = [own[i : i + self.batch_size] for i in range(0, len(own), self.batch_size)]
        supervised = [e.supervised for e in chosen]
        packing = pad if stream in self.method.rows_apart else self.packing
        return Batch(stream, [packing(m) for m in micro], sum(supervised), supervised.count(0))

    def whole(self, stream: Stream, size: int) -> Iterator[Batch]:
        """Every row of a stream once, in its own order, `size` at a time; each batch is shared out among the ranks."""
        examples = self.streams[stream]
        for start in range(0, len(examples), size):
            yield self._shared_out(stream, [examples[i] for i in range(start, min(start + size, len(examples)))])

    def _row(self, stream: Stream, position: int) -> int:
        epoch, offset = divmod(position, len(self.streams[stream]))
        place = 0 if self.method.paired else list(self.streams).index(stream)
        return int(_permutation(self.seed, place, epoch, len(self.streams[stream]))[offset])


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
