"""What a method builds its gradient from: forward and backward passes over a batch's micro-batches and all ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lisa_lightning.data.interleave import Batch
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.lora import trainable
from lisa_lightning.objective.loss import completion_loss

Share = Callable[[Sequence[Pack]], Tensor]
"""Micro-batch -> its share of the batch's loss: summed over micro-batches and ranks it is the whole."""
Gradient = Sequence[Tensor | None]
"""One for each trainable weight; None where the optimizer shall leave the weight and its moments alone."""


Whole = Callable[[Stream, int], Iterator[Batch]]
"""Every row of a stream, so many at a time (`StepBatches.whole`)."""


@dataclass
class Descent:
    """What a method makes of a step."""

    loss: float
    """Of the batch that the step is about, without penalties: the mean over its supervised tokens."""
    gradient: Gradient
    metrics: dict[str, float] = field(default_factory=dict)


class Passes:
    """The net as a method sees it. Gradients are of the trainable weights, summed over micro-batches and ranks.

    Every pass of a step draws the same dropout masks, so that what one pass finds holds for the next.

    Args:
        net: a model with trainable weights (a `PeftModel`).
        whole: every row of a stream.
        deltas: what aligning changed in each linear layer, by its name in the model; read when called for.
    """

    def __init__(self, net: Any, whole: Whole, deltas: Callable[[], Mapping[str, Delta]] = dict) -> None:
        self.net = net
        self.model: Any = net.get_base_model()
        self.weights: list[Tensor] = list(trainable(net).values())
        self.names: list[str] = list(trainable(net))
        self._whole = whole
        self.deltas = deltas
        self.seed = 0
        """Of this step and rank."""

    def every_row(self, stream: Stream, size: int) -> Iterator[Batch]:
        """All rows of a stream, `size` at a time, shared out among the ranks."""
        for batch in self._whole(stream, size):
            yield batch.to(self.device)

    def gradient(
        self, batch: Batch, share: Share | None = None, weights: Sequence[Tensor] | None = None
    ) -> tuple[float, list[Tensor]]:
        """A loss of the batch, by default the mean over its supervised tokens, and its gradient.

        Args:
            share: what the loss is a sum of.
            weights: a part of the trainable weights, which alone get a gradient.
        """
        weights = self.weights if weights is None else weights
        share = share or self.mean_loss(batch)
        total = torch.zeros((), device=self.device)
        gradient = [torch.zeros_like(w) for w in weights]
        for packs in self.micro_batches(batch):
            loss = share(packs)
            total += loss.detach()
            for sum_, own in zip(gradient, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if own is not None:
                    sum_.add_(own)
        total, *gradient = self.summed([total, *gradient])
        return total.item(), gradient

    def micro_batches(self, batch: Batch) -> Iterator[Sequence[Pack]]:
        """This rank's micro-batches that hold a row, for one pass over each: with the step's first dropout mask on."""
        torch.manual_seed(self.seed)
        yield from filter(None, batch.micro_batches)

    def mean_loss(self, batch: Batch) -> Share:
        """Each micro-batch's share of the mean over the batch's supervised tokens."""
        scale = 1 / max(1, batch.tokens)
        return lambda packs: completion_loss(self.model, packs) * scale

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Forward passes within have no gradient, and the dropout masks of the pass that follows."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights[0].device

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    @property
    def rank(self) -> int:
        """This process among them."""
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the ranks, as one message."""
        if self.ranks == 1:
            return list(tensors)
        flat = torch.cat([t.float().flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def gathered(self, parts: Sequence[Tensor], columns: int) -> tuple[Tensor, int]:
        """Rows of all micro-batches and ranks as one [R, T, columns], filled up by zeros; this rank's first row.

        A rank may have no part, so the type is that of the trainable weights.
        """
        sizes = torch.tensor([sum(len(p) for p in parts), max((p.shape[1] for p in parts), default=0)])
        if self.ranks > 1:
            every = [torch.zeros_like(sizes).to(self.device) for _ in range(self.ranks)]
            torch.distributed.all_gather(every, sizes.to(self.device))
        else:
            every = [sizes]
        counts, width = [int(s[0]) for s in every], max(int(s[1]) for s in every)
        first = row = sum(counts[: self.rank])
        whole = torch.zeros(sum(counts), width, columns, device=self.device, dtype=self.weights[0].dtype)
        for part in parts:
            whole[row : row + len(part), : part.shape[1]] = part
            row += len(part)
        return self.summed([whole])[0], first

    @contextmanager
    def at(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The trainable weights moved to these values; afterwards they are what they were, bit for bit."""
        kept = [w.detach().clone() for w in self.weights]
        try:
            self.move(values)
            yield
        finally:
            self.move(kept)

    @torch.no_grad()
    def move(self, values: Sequence[Tensor]) -> None:
        """Set the trainable weights."""
        torch.clear_autocast_cache()  # casts of them as they were
        for w, value in zip(self.weights, values, strict=True):
            w.copy_(value)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all of them together, in float32."""
    return torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt()
