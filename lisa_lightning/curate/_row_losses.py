"""Losses and gradients of rows under a model, over all ranks: `RowBackprop`, and the random order of the rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice, zip_longest

import numpy as np
import torch
from torch import Tensor

from lisa_lightning.data.interleave import Batch, Examples
from lisa_lightning.data.packing import Example, Pack, Packing, fill_up
from lisa_lightning.model.sharding import is_sharded
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss import row_losses
from lisa_lightning.runtime.errors import UserError

Objective = Callable[[Tensor, list[int]], Tensor]
"""[R] mean losses of a micro-batch's rows, and their indices in the batch -> [R] terms of the mean to differentiate."""


@dataclass(frozen=True, slots=True)
class RowBackprop:
    """Losses of rows and their gradients. The rows are split into micro-batches and sharded over the ranks."""

    backprop: Backprop
    packing: Packing
    micro_batch: int
    """Rows of a pass."""

    def gradients(self, rows: Sequence[Example], objective: Objective) -> "ObjectiveGradients":
        """Return the mean of an objective over the rows that have a label, and its gradients.

        Rows without a label count neither in the sum nor in the divisor.
        """
        labelled = max(1, sum(bool(row.supervised) for row in rows))
        micro_batches = self._micro_batches(rows)
        losses = torch.zeros(len(rows), device=self.backprop.device)

        def mean_objective(packs: Sequence[Pack], index: int) -> Tensor:
            indices, _ = micro_batches[index]
            means = self._mean_losses(packs)
            losses[indices] = means.detach().to(losses.dtype)
            return objective(means, indices).sum() / labelled

        batch = Batch("alignment", [packs for _, packs in micro_batches], tokens=0)
        value, gradients = self.backprop.gradient(batch, mean_objective)
        return ObjectiveGradients(value, gradients, self.backprop.all_reduce_sum([losses])[0])

    @torch.no_grad()
    def losses(self, rows: Sequence[Example]) -> Tensor:
        """Return the mean loss of each row over its label tokens, [B]; 0 for a row without one."""
        micro_batches = self._micro_batches(rows)
        batch = Batch("alignment", [packs for _, packs in micro_batches], tokens=0)
        losses = torch.zeros(len(rows), device=self.backprop.device, dtype=self.backprop.weights[0].dtype)
        for (indices, _), packs in zip(micro_batches, self.backprop.micro_batches(batch), strict=True):
            losses[indices] = self._mean_losses(packs).to(losses.dtype)
        return self.backprop.all_reduce_sum([losses])[0]

    def _mean_losses(self, packs: Sequence[Pack]) -> Tensor:
        sums, labels = row_losses(self.backprop.model, packs)
        return sums / labels

    def _micro_batches(self, rows: Sequence[Example]) -> list[tuple[list[int], list[Pack]]]:
        """Return indices and packs of the labelled rows of each micro-batch of this rank.

        If the model is sharded, fillers follow, as in `fill_up`, without indices.
        """
        backprop = self.backprop
        indices = self._labelled(rows, backprop.rank)
        if is_sharded(backprop.net):
            of_ranks = [self._packs(rows, self._labelled(rows, rank)) for rank in range(backprop.ranks)]
            packs = fill_up(of_ranks, backprop.rank)
        else:
            packs = self._packs(rows, indices)
        on_device = [[p.to(backprop.device) for p in micro_batch] for micro_batch in packs]
        return list(zip_longest(indices, on_device, fillvalue=[]))

    def _packs(self, rows: Sequence[Example], indices: Sequence[Sequence[int]]) -> list[list[Pack]]:
        """Return the packs of the rows of each micro-batch."""
        return [self.packing([rows[i] for i in micro_batch]) for micro_batch in indices]

    def _labelled(self, rows: Sequence[Example], rank: int) -> list[list[int]]:
        """Return the indices of the labelled rows of each micro-batch of a rank that has any."""
        shard_size = -(-len(rows) // self.backprop.ranks)
        shard = range(len(rows))[rank * shard_size : (rank + 1) * shard_size]
        starts = range(0, len(shard), self.micro_batch)
        micro_batches = ([i for i in shard[s : s + self.micro_batch] if rows[i].supervised] for s in starts)
        return [indices for indices in micro_batches if indices]


@dataclass(frozen=True, slots=True)
class ObjectiveGradients:
    """Value and gradients of an objective over a batch of rows, summed over all ranks."""

    value: float
    gradients: list[Tensor]
    losses: Tensor
    """[B] mean loss of each row, 0 for a row without label."""


def labelled_rows(rows: Examples) -> list[int]:
    """Return the indices of the rows that have a label token.

    Raises:
        UserError: if no row has one.
    """
    indices = [i for i in range(len(rows)) if rows[i].supervised]
    if not indices:
        raise UserError("data.max_length: no alignment row has a label token within it. Fix: a larger data.max_length")
    return indices


def iter_batches(seed: Sequence[int], size: int, batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices without end, from one random order of all indices after another."""
    indices = (index for epoch in count() for index in shuffled([*seed, epoch], size))
    while True:
        yield list(islice(indices, batch_size))


def shuffled(seed: Sequence[int], size: int) -> list[int]:
    """Return the indices of `size` rows in a random order."""
    return np.random.default_rng([*seed]).permutation(size).tolist()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the dropout masks of a step on a rank."""
    return int(np.random.default_rng([seed, step, rank]).integers(2**62))


def require_finite(value: float, step: int, key: str, lr: float) -> None:
    """Raise UserError unless a loss is finite; the message names the key of the learning rate."""
    if not math.isfinite(value):
        raise UserError(f"{key}={lr}: a loss of step {step} is {value}. Fix: a smaller {key} may help")
