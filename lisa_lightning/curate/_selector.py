"""The bilevel selector of SEAL and Pharmacist: `BilevelSelector.fit_weights` trains row weights along with a model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from itertools import count, islice
from typing import Final, Literal

import numpy as np
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, Positive, PositiveShare, Seed, Share
from lisa_lightning.curate.base import Selector
from lisa_lightning.data.interleave import Batch, Examples
from lisa_lightning.data.packing import Example, Pack, Packing
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss import row_losses
from lisa_lightning.runtime.errors import UserError

Activation = Literal["softmax", "sigmoid"]
BETAS: Final = (0.9, 0.95)
CLIP: Final = 1.0
INITIAL_THETA: Final = {"softmax": 0.1, "sigmoid": -1e-4}

Objective = Callable[[Tensor, list[int]], Tensor]
"""[R] mean losses of a micro-batch's rows, and their indices in the batch -> [R] terms of the minimized mean."""
UpperLoss = Callable[[Tensor], Tensor]
"""[R] mean losses of upper rows -> [R] terms of the mean that the upper level minimizes."""


@dataclass(frozen=True, config=STRICT)
class BilevelSelector(Selector):
    """Scores are weights p_i of the candidates, trained by SEAL's penalty method (Shen et al., ICLR 2025).

    With l_i the mean loss over the label tokens of row i, each step lets the model descend

        c * mean_upper(u(l)) + (1 - c) * mean_i(p_i * l_i)

    and the selector

        mean_i(p_i * l_i)

    with l_i held fixed. p is near 1 at first, and is N * softmax(theta) over all N candidates or 2 * sigmoid(theta). A
    candidate is ranked down if its loss is high under a model that the upper rows pull. A row that was difficult from
    the start is ranked down too: while the model has moved little, the ranking is that of the base model's loss.

    As in the official code, the model descends by Adam (0.9, 0.95) at a constant rate, gradients are clipped at norm 1,
    and second derivatives are dropped. Two forward and two backward passes a step.

    Departure from the official code:
        - `adam`: the official code uses Adam for theta too. Adam divides by the size of a row's gradients, so that the
          loss of a row hardly changes how far it falls per visit. If a step has few of the candidates, a few epochs end
          close to chance. Measured on a tiny model with 40 rows, half of which contradict the upper rows, 5 rows a
          step, 3 epochs, softmax, five seeds: a helpful row ranked above a contradicting one in 36 to 55 % of pairs,
          with plain gradient descent in 100 %. With Adam, put all rows into one step or train for many epochs.

    A candidate without a label token scores 0, the lowest. Without dropout, scores are the same for any split into
    micro-batches and ranks.
    """

    keep: PositiveShare = 0.8
    """Share of the rows to keep. SEAL's script has 0.8."""
    epochs: Count = 3
    """Passes over the candidates. SEAL's script has 3."""
    batch_size: Count = 64
    """Candidates of a step over all ranks, and as many upper rows. SEAL's script has 64."""
    micro_batch: Count = 8
    """Rows of a forward pass."""
    lr: Positive = 1e-3
    """Learning rate of the model. SEAL has 1e-5, for some 5000 steps."""
    selector_lr: Positive = 5e-3
    """Learning rate of theta. SEAL's script has 5e-3, its default is 1e-2, both for Adam."""
    adam: bool = False
    """Train theta by Adam, as SEAL's code does, instead of plain gradient descent."""
    activation: Activation = "softmax"
    """softmax, as in SEAL: rows compete. sigmoid: the weight of a row does not depend on other rows."""
    upper_weight: Share = 1.0
    """c in the first epoch. SEAL's script has 1, its default is 0.9."""
    upper_decay: Share = 0.03
    """Decrease of c per epoch, down to 0. SEAL's script has 0.03, its default is 0.1."""
    seed: Seed = 0
    """Seed of the order of rows."""

    def fit_weights(
        self, backprop: Backprop, packing: Packing, candidates: Examples, upper: Examples, upper_loss: UpperLoss
    ) -> Tensor:
        """Return the weights p of the N candidates, [N]. The model's weights are unchanged afterwards.

        Args:
            backprop: the model; it is trained from its present weights.
            packing: how the model packs rows.
            candidates: the rows to weight.
            upper: the rows of the upper level.
            upper_loss: u, of the mean losses of upper rows.

        Raises:
            UserError: if a loss is not finite, or no candidate has a label.
        """
        label_rows = [i for i in range(len(candidates)) if candidates[i].supervised]
        if not label_rows:
            raise UserError(
                "data.max_length: no alignment row has a label token within it. Fix: a larger data.max_length"
            )
        # A row without loss would outweigh all others in the softmax.
        labelled = Examples([candidates.rows[i] for i in label_rows], candidates.encode)
        theta = torch.full((len(labelled),), INITIAL_THETA[self.activation], device=backprop.device, requires_grad=True)
        model_optimizer = torch.optim.Adam(backprop.weights, lr=self.lr, betas=BETAS)
        adam = torch.optim.Adam([theta], lr=self.selector_lr, betas=BETAS)
        theta_optimizer = adam if self.adam else torch.optim.SGD([theta], lr=self.selector_lr)
        with backprop.swapped_weights(backprop.weights):
            for step, (c, indices, batch, upper_batch) in enumerate(self._batches(labelled, upper)):
                backprop.seed = int(np.random.default_rng([self.seed, step, backprop.rank]).integers(2**62))
                p = row_weights(theta, self.activation)[indices]
                fixed_p = p.detach()
                levels = self._levels(
                    *(backprop, packing, upper_batch, batch),
                    lambda losses, _, c=c: c * upper_loss(losses),
                    lambda losses, rows, c=c, p=fixed_p: (1 - c) * p[rows] * losses,
                )
                if levels is None:
                    continue
                upper_level, lower_level = levels
                gradients = zip(upper_level.gradients, lower_level.gradients, strict=True)
                _descend(model_optimizer, backprop.weights, [a + b for a, b in gradients])
                # The divisor is constant, since the rows of an epoch's smaller last step would fall further otherwise.
                loss = (p * lower_level.losses).sum() / self.batch_size
                self._require_finite(upper_level.loss + lower_level.loss + loss.item(), step)
                _descend(theta_optimizer, [theta], torch.autograd.grad(loss, [theta]))
        for weight in backprop.weights:
            weight.grad = None
        scores = torch.zeros(len(candidates), device=backprop.device)
        scores[label_rows] = row_weights(theta.detach(), self.activation)
        return scores

    def _batches(
        self, candidates: Examples, upper: Examples
    ) -> Iterator[tuple[float, list[int], list[Example], list[Example]]]:
        """Yield c, the indices of the candidates, the candidates and as many upper rows of each step."""
        upper_order = self._endless_order(len(upper))
        for epoch in range(self.epochs):
            order = self._order(1, epoch, len(candidates))
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                upper_batch = [upper[i] for i in islice(upper_order, len(indices))]
                c = max(0.0, self.upper_weight - epoch * self.upper_decay)
                yield c, indices, [candidates[i] for i in indices], upper_batch

    def _endless_order(self, size: int) -> Iterator[int]:
        """Yield the indices of the upper rows in one random order after another."""
        for epoch in count():
            yield from self._order(2, epoch, size)

    def _order(self, level: int, epoch: int, size: int) -> list[int]:
        return np.random.default_rng([self.seed, level, epoch]).permutation(size).tolist()

    def _levels(
        self,
        backprop: Backprop,
        packing: Packing,
        upper_rows: Sequence[Example],
        lower_rows: Sequence[Example],
        upper_objective: Objective,
        lower_objective: Objective,
    ) -> "tuple[_LevelOutput, _LevelOutput] | None":
        """Return the outputs of the upper and the lower level, or None if a gradient overflows in float16."""
        return backprop.skip_on_overflow(
            lambda: (
                self._level(backprop, packing, upper_rows, upper_objective),
                self._level(backprop, packing, lower_rows, lower_objective),
            )
        )

    def _level(
        self, backprop: Backprop, packing: Packing, rows: Sequence[Example], objective: Objective
    ) -> "_LevelOutput":
        """Return mean and gradients of the objective over the rows that have a label."""
        labelled = max(1, sum(bool(row.supervised) for row in rows))
        micro_batches = list(_micro_batches(rows, packing, self.micro_batch, backprop))
        losses = torch.zeros(len(rows), device=backprop.device)

        def mean_objective(packs: Sequence[Pack], index: int) -> Tensor:
            indices, _ = micro_batches[index]
            sums, labels = row_losses(backprop.model, packs)
            means = sums / labels
            losses[indices] = means.detach()
            return objective(means, indices).sum() / labelled

        batch = Batch("alignment", [packs for _, packs in micro_batches], tokens=0)
        loss, gradients = backprop.gradient(batch, mean_objective)
        return _LevelOutput(loss, gradients, backprop.all_reduce_sum([losses])[0])

    def _require_finite(self, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(f"curate.lr={self.lr}: a loss of step {step} is {value}. Fix: a smaller curate.lr may help")


@plain_dataclass(frozen=True, slots=True)
class _LevelOutput:
    """Loss, gradients and row losses of one level, over all ranks."""

    loss: float
    gradients: list[Tensor]
    losses: Tensor
    """[B] mean loss of each row, 0 for a row without label."""


def row_weights(theta: Tensor, activation: Activation) -> Tensor:
    """Return p of theta, both [N]. With theta = 0 all weights are 1."""
    return len(theta) * theta.softmax(0) if activation == "softmax" else 2 * theta.sigmoid()


def _micro_batches(
    rows: Sequence[Example], packing: Packing, size: int, backprop: Backprop
) -> Iterator[tuple[list[int], list[Pack]]]:
    """Yield indices and packs of the labelled rows of each micro-batch of this rank."""
    shard_size = -(-len(rows) // backprop.ranks)
    shard = range(len(rows))[backprop.rank * shard_size : (backprop.rank + 1) * shard_size]
    for start in range(0, len(shard), size):
        indices = [i for i in shard[start : start + size] if rows[i].supervised]
        if indices:
            yield indices, [p.to(backprop.device) for p in packing([rows[i] for i in indices])]


def _descend(optimizer: torch.optim.Optimizer, variables: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.grad = gradient
    torch.nn.utils.clip_grad_norm_(variables, CLIP)
    optimizer.step()
