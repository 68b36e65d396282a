"""Batches of optimizer step t as a pure function of (seed, t), by indexing one permutation per stream and epoch.

Start reading at `StepBatches` and `row_permutation`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from lisa_lightning.data.packing import Example, Pack, Packing, fill_up, pad
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.data.spacing import evenly_spaced
from lisa_lightning.runtime.errors import UserError


@dataclass(slots=True)
class Batch:
    """One rank's shard of the rows of one stream."""

    stream: Stream
    micro_batches: list[list[Pack]]
    """Packs of each micro-batch of this rank."""
    tokens: int
    """Supervised tokens of the batch over all micro-batches and ranks, the denominator of its mean loss."""
    unlabelled: int = 0
    """Rows of the batch without a supervised token, over all micro-batches and ranks. The loss ignores them."""
    further: list["Batch"] = field(default_factory=list)
    """Further batches of the step from the same stream."""

    @property
    def nonempty(self) -> list[list[Pack]]:
        """Micro-batches of this rank that have a row."""
        return [packs for packs in self.micro_batches if packs]

    def to(self, device: torch.device | str, **kwargs: Any) -> "Batch":
        """Return a copy of the batch on another device."""
        moved = [[p.to(device, **kwargs) for p in micro] for micro in self.micro_batches]
        return replace(self, micro_batches=moved, further=[batch.to(device, **kwargs) for batch in self.further])


@dataclass(slots=True)
class Step:
    """One rank's shard of the batches of one optimizer step."""

    index: int
    """0-based index among all steps of the training."""
    total: int
    """Number of steps of the training."""
    batches: dict[Stream, Batch]
    """Batches by stream; the main batch is the first."""

    @property
    def main(self) -> Batch:
        """Batch whose loss is logged, that of the first stream."""
        return next(iter(self.batches.values()))

    @property
    def unlabelled(self) -> int:
        """Rows of all batches without a supervised token, over all micro-batches and ranks."""
        return sum(b.unlabelled for first in self.batches.values() for b in (first, *first.further))

    def to(self, device: torch.device | str, **kwargs: Any) -> "Step":
        """Return a copy of the step on another device. Lightning's batch transfer calls it."""
        return Step(self.index, self.total, {name: batch.to(device, **kwargs) for name, batch in self.batches.items()})


class BatchPlan(Protocol):
    """Interface of a method to the data: which rows each step draws."""

    @property
    def unpacked_streams(self) -> Set[Stream]:
        """Streams whose rows are padded even if other streams are packed."""
        ...

    @property
    def paired(self) -> bool:
        """True if row i of every stream belongs together, so that all streams are drawn in one order."""
        ...

    def plan(self, step: int) -> Mapping[Stream, StreamBatch]:
        """Return the batches of a step by stream; the main stream comes first."""
        ...


class StepBatches(Dataset[Step]):
    """Dataset whose item t is the data of optimizer step t.

    The k-th step that draws from a stream takes its k-th block of positions. A block has the size of the step's
    `StreamBatch`, by default

        batch_size * accumulate * world

    With N rows, position i is entry i mod N of the permutation of epoch i div N. Ranks and micro-batches are offsets in
    the block, so any split of the same total draws the same rows. Further batches of a step follow in the same block.
    Each batch is sharded separately.

    Args:
        streams: examples of each stream, which are encoded when they are indexed. Memory grows with their number by the
            permutation alone. The index of a stream in this mapping is part of its permutation's seed.
        packing: turns a micro-batch into packs.
        method: returns the rows that each step draws, and the streams whose rows must be padded.
        total_steps: number of optimizer steps.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of a step per rank.
        seed: seed of all permutations.
        discard: draw user rows in alignment steps too and discard them, as the official code does.
        rank: index of this process.
        world: number of processes.
        even: give all ranks as many packs, as a sharded model needs (`fill_up`).
    """

    def __init__(
        self,
        streams: Mapping[Stream, "Examples"],
        packing: Packing,
        method: BatchPlan,
        total_steps: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        discard: bool = False,
        rank: int = 0,
        world: int = 1,
        even: bool = False,
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
        self.even = even

    def __len__(self) -> int:
        return self.total_steps

    def __getitem__(self, t: int) -> Step:
        batches: dict[Stream, Batch] = {
            stream: self._batch(t, stream, stream_batch) for stream, stream_batch in self.method.plan(t).items()
        }
        return Step(t, self.total_steps, batches)

    def _batch(self, t: int, stream: Stream, stream_batch: StreamBatch) -> Batch:
        steps_before = t if stream == "user" and self.discard else stream_batch.steps_before
        size = stream_batch.size or self.batch_size * self.accumulate * self.world
        examples = self.streams[stream]
        if not len(examples):
            raise UserError(
                f"{type(self.method).__name__} draws {stream} rows, and this stage has none. "
                "Fix: choose another method for this stage"
            )
        sizes = (size, *stream_batch.further)
        start = steps_before * sum(sizes)
        block = (examples[self._row(stream, start + i)] for i in range(sum(sizes)))
        first, *further = [self._shard(stream, list(islice(block, size))) for size in sizes]
        return replace(first, further=further)

    def _shard(self, stream: Stream, examples: Sequence[Example], padded: bool = False) -> Batch:
        """Return this rank's micro-batches of a batch, with the token count of the unsharded batch."""
        packing = pad if padded or stream in self.method.unpacked_streams else self.packing
        if self.even:
            of_ranks = [self._micro_batches(examples, rank, packing) for rank in range(self.world)]
            micro_batches = fill_up(of_ranks, self.rank)
        else:
            micro_batches = self._micro_batches(examples, self.rank, packing)
        supervised = [e.supervised for e in examples]
        return Batch(stream, micro_batches, sum(supervised), supervised.count(0))

    def _micro_batches(self, examples: Sequence[Example], rank: int, packing: Packing) -> list[list[Pack]]:
        """Return the packs of each micro-batch of a rank."""
        shard_size = -(-len(examples) // self.world)
        shard = examples[rank * shard_size : (rank + 1) * shard_size]
        return [packing(shard[i : i + self.batch_size]) for i in range(0, len(shard), self.batch_size)]

    def iter_stream(
        self, stream: Stream, batch_size: int, padded: bool = False, rows: int | None = None
    ) -> Iterator[Batch]:
        """Yield rows of a stream once, unshuffled, sharded over the ranks.

        Args:
            stream: name of the stream.
            batch_size: rows of a batch over all micro-batches and ranks; the last batch may have fewer.
            padded: pad the rows, even if steps pack rows of this stream.
            rows: number of rows, evenly spaced; None for all.
        """
        examples = self.streams[stream]
        indices = evenly_spaced(len(examples), len(examples) if rows is None else rows)
        for start in range(0, len(indices), batch_size):
            yield self._shard(stream, [examples[i] for i in indices[start : start + batch_size]], padded)

    def _row(self, stream: Stream, position: int) -> int:
        """Return the row index at a position of the concatenated permutations of a stream."""
        epoch, offset = divmod(position, len(self.streams[stream]))
        stream_index = 0 if self.method.paired else list(self.streams).index(stream)
        return int(row_permutation(self.seed, stream_index, epoch, len(self.streams[stream]))[offset])


@lru_cache(maxsize=8)
def row_permutation(seed: int, stream_index: int, epoch: int, length: int) -> np.ndarray:
    """Return the order of a stream's rows in an epoch, [length] indices."""
    return np.random.default_rng([seed, stream_index, epoch]).permutation(length)


class Examples:
    """Rows that are encoded when they are indexed."""

    def __init__(self, rows: Sequence[Any], encode: Callable[[Any], Example]) -> None:
        self.rows = rows
        self.encode = encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.encode(self.rows[index])

    def subset(self, indices: Sequence[int]) -> "Examples":
        """Return the rows of these indices, in their order."""
        return Examples([self.rows[i] for i in indices], self.encode)
