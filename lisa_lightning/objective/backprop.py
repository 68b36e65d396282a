"""Backward passes of a step over its micro-batches and all ranks: `Backprop.gradient`, which returns to a method."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from lisa_lightning.data.interleave import Batch
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import causal_model, trainable
from lisa_lightning.model.hooks import (
    attention_blocks,
    decoder_layers,
    final_norm,
    layer_of_parameters,
    mlp_blocks,
)
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.objective.loss_scale import GradientOverflowError, LossScale

log = logging.getLogger(__name__)

LossFn = Callable[[Sequence[Pack], int], Tensor]
"""Packs of a micro-batch, and its index among this rank's -> its share of the batch's loss.

The sum of the shares over micro-batches and ranks is the loss.
"""
Gradients = Sequence[Tensor | None]
"""One for each trainable weight; None where the optimizer must skip the weight and its moments."""
State = dict[str, list[Tensor]]
"""Tensors of a method by name. A checkpoint holds all of them."""
IterStream = Callable[[Stream, int, bool, int | None], Iterator[Batch]]
"""Stream, rows a batch, whether to pad them, number of rows -> the rows in batches (`StepBatches.iter_stream`)."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class StepOutput:
    """Loss, gradients and metrics of one optimizer step."""

    loss: float
    """Mean loss over the supervised tokens of the main batch, without penalties."""
    gradients: Gradients
    metrics: dict[str, float] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    """New values of entries of the method's state."""
    clipped: bool = False
    """Apply the gradients unchanged, since the method has clipped them."""


class Backprop:
    """Computes gradients of the trainable weights, summed over micro-batches and ranks.

    Every pass of a step draws the same dropout masks, so that what one pass computes is valid for the next.

    Args:
        net: a model with trainable weights: a `PeftModel`, or a model of transformers.
        iter_stream: yields every row of a stream.
        deltas: returns what alignment changed in each linear layer, by its name in the model.
        loss_scale: factor of the losses in float16; None for other precisions.
    """

    def __init__(
        self,
        net: Any,
        iter_stream: IterStream,
        deltas: Callable[[], Mapping[str, Delta]] = dict,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.net = net
        self.model: Any = causal_model(net)
        self.weights: list[Tensor] = list(trainable(net).values())
        self.names: list[str] = list(trainable(net))
        self._iter_stream = iter_stream
        self._deltas = deltas
        self.loss_scale = loss_scale
        self.seed = 0
        """Seed of the dropout masks, for this step and rank."""

    @cached_property
    def deltas(self) -> dict[str, Delta]:
        """Change of each linear layer at alignment, on the device of the weights."""
        return {name: delta.to(self.device) for name, delta in self._deltas().items()}

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder layers. Raises UserError if the model has no list of them."""
        return decoder_layers(self.model)

    @cached_property
    def layer_of(self) -> list[int | None]:
        """The index of each trainable weight's decoder layer, None outside. Raises UserError if there is no layer."""
        indices = layer_of_parameters(self.net)
        return [indices.get(name) for name in self.names]

    @cached_property
    def attention_blocks(self) -> list[nn.Module]:
        """The attention block of each layer. Raises UserError if a layer has none."""
        return attention_blocks(self.model)

    @cached_property
    def mlp_blocks(self) -> list[nn.Module]:
        """The MLP block of each layer. Raises UserError if a layer has none."""
        return mlp_blocks(self.model)

    @cached_property
    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the unembedding. Raises UserError if there is none."""
        return final_norm(self.model)

    def iter_stream(
        self, stream: Stream, batch_size: int, padded: bool = False, rows: int | None = None
    ) -> Iterator[Batch]:
        """Yield rows of a stream once, `batch_size` at a time, sharded over the ranks.

        Args:
            stream: name of the stream.
            batch_size: rows of a batch over all micro-batches and ranks; the last batch may have fewer.
            padded: pad the rows, even if steps pack rows of this stream.
            rows: number of rows, evenly spaced; None for all.
        """
        for batch in self._iter_stream(stream, batch_size, padded, rows):
            yield batch.to(self.device)

    def gradient(
        self, batch: Batch, loss_fn: LossFn | None = None, weights: Sequence[Tensor] | None = None
    ) -> tuple[float, list[Tensor]]:
        """Return a loss of a batch and its gradients.

        Args:
            batch: a batch of the step.
            loss_fn: a micro-batch's share of the loss; by default of the mean over the batch's supervised tokens.
            weights: a subset of the trainable weights, by default all.

        Returns:
            The loss, and one gradient for each of `weights`; both are sums over micro-batches and ranks.

        Raises:
            GradientOverflowError: if the loss is scaled and a gradient is infinite or NaN.
        """
        weights = self.weights if weights is None else weights
        loss_fn = loss_fn or self.mean_loss(batch)
        total = torch.zeros((), device=self.device)
        sums = [torch.zeros_like(w) for w in weights]
        for index, packs in enumerate(self.micro_batches(batch)):
            loss = loss_fn(packs, index)
            total += loss.detach()
            for sum_, gradient in zip(sums, self.differentiate(loss, weights, allow_unused=True), strict=True):
                if gradient is not None:
                    sum_.add_(gradient)
        total, *sums = self.all_reduce_sum([total, *sums])
        self.raise_on_overflow(sums)
        return total.item(), sums

    def differentiate(self, loss: Tensor, inputs: Sequence[Tensor], allow_unused: bool = False) -> tuple[Tensor, ...]:
        """Return the gradients of a micro-batch's loss, as `torch.autograd.grad` does.

        In float16 the loss is scaled for the backward pass; the gradients are unscaled and float32.
        """
        if self.loss_scale is None:
            return torch.autograd.grad(loss, inputs, allow_unused=allow_unused)
        return self.loss_scale.gradients(loss, inputs, allow_unused)

    def raise_on_overflow(self, gradients: Sequence[Tensor]) -> None:
        """Raise GradientOverflowError on every rank if the loss is scaled and a rank's gradient is infinite or NaN."""
        if self.loss_scale is None:
            return
        overflows = [(~gradient.isfinite()).any().float() for gradient in gradients]
        count = torch.stack([torch.zeros((), device=self.device), *overflows]).sum()
        if self.all_reduce_sum([count])[0] > 0:
            raise GradientOverflowError

    def skip_on_overflow(self, compute: Callable[[], Result]) -> Result | None:
        """Compute the gradients of an optimizer step, and adapt the loss scale.

        Returns:
            What `compute` returns, or None if a gradient overflows and the step must be skipped.

        Raises:
            NotFiniteError: if the loss scale can't become smaller.
        """
        if self.loss_scale is None:
            return compute()
        try:
            result = compute()
        except GradientOverflowError:
            result = None
        self.loss_scale.update(skipped=result is None)
        if result is None and self.rank == 0:
            log.info(
                "A gradient overflowed in float16. A step is skipped, the loss scale is %g.", self.loss_scale.value
            )
        return result

    def micro_batches(self, batch: Batch) -> Iterator[Sequence[Pack]]:
        """Yield this rank's micro-batches that have a row, for one pass each, starting with the first dropout mask."""
        torch.manual_seed(self.seed)
        yield from batch.nonempty

    def mean_loss(self, batch: Batch) -> LossFn:
        """Return the loss function of the mean over a batch's supervised tokens."""
        scale = 1 / max(1, batch.tokens)
        return lambda packs, _: completion_loss(self.model, packs) * scale

    @contextmanager
    def no_grad_keep_rng(self) -> Iterator[None]:
        """Disable gradients inside, with the dropout masks of the pass that follows."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield

    @contextmanager
    def reference_pass(self, anchor: Sequence[Tensor]) -> Iterator[None]:
        """Set the weights of a reference model inside, without gradients and with the masks of the pass that follows.

        Args:
            anchor: values of the trainable weights.
        """
        with self.no_grad_keep_rng(), self.swapped_weights(anchor):
            yield

    @contextmanager
    def no_dropout(self) -> Iterator[None]:
        """Disable dropout inside."""
        training = self.net.training
        self.net.eval()
        try:
            yield
        finally:
            self.net.train(training)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.weights[0].device

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

    @property
    def rank(self) -> int:
        """The index of this process."""
        return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return each tensor summed over the ranks, in one message."""
        if self.ranks == 1:
            return list(tensors)
        flat = torch.cat([t.float().flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        sums = flat.split([t.numel() for t in tensors])
        return [total.view_as(t).to(t.dtype) for total, t in zip(sums, tensors, strict=True)]

    def all_gather_rows(self, tensors: Sequence[Tensor], columns: int) -> tuple[Tensor, int]:
        """Return the rows of all micro-batches and ranks as one tensor, and the index of this rank's first row.

        Args:
            tensors: one [rows, tokens, columns] for each micro-batch of this rank; it may have none.
            columns: size of the last dimension.

        Returns:
            A tensor [R, T, columns] padded with zeros, in the precision of the trainable weights, and the index.
        """
        shape = torch.tensor([sum(len(t) for t in tensors), max((t.shape[1] for t in tensors), default=0)])
        if self.ranks > 1:
            shapes = [torch.zeros_like(shape).to(self.device) for _ in range(self.ranks)]
            torch.distributed.all_gather(shapes, shape.to(self.device))
        else:
            shapes = [shape]
        counts, width = [int(s[0]) for s in shapes], max(int(s[1]) for s in shapes)
        first = row = sum(counts[: self.rank])
        rows = torch.zeros(sum(counts), width, columns, device=self.device, dtype=self.weights[0].dtype)
        for tensor in tensors:
            rows[row : row + len(tensor), : tensor.shape[1]] = tensor
            row += len(tensor)
        return self.all_reduce_sum([rows])[0], first

    @contextmanager
    def swapped_weights(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Set the trainable weights inside, and restore them bit for bit afterwards."""
        originals = [w.detach().clone() for w in self.weights]
        try:
            self.set_weights(values)
            yield
        finally:
            self.set_weights(originals)

    @torch.no_grad()
    def set_weights(self, values: Sequence[Tensor]) -> None:
        """Set the trainable weights."""
        torch.clear_autocast_cache()  # it holds casts of the old values
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, in float32."""
    return torch.stack([t.float().square().sum() for t in tensors]).sum().sqrt()


def clip(gradients: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    """Return the gradients scaled down to a norm of at most `max_norm`, and their norm before.

    The factor is that of `torch.nn.utils.clip_grad_norm_`.
    """
    length = norm(gradients)
    factor = (max_norm / (length + 1e-6)).clamp(max=1.0)
    return [gradient * factor for gradient in gradients], length
