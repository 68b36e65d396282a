"""The bilevel selector that SEAL and Pharmacist share: weights of rows, trained along with a model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lisa_lightning.curate.base import Curate
from lisa_lightning.data.interleave import Batch, Examples
from lisa_lightning.data.packing import Example, Pack, Packing
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.objective.loss import row_losses
from lisa_lightning.runtime.errors import UserError

Activation = Literal["softmax", "sigmoid"]
BETAS = (0.9, 0.95)
CLIP = 1.0
START = {"softmax": 0.1, "sigmoid": -1e-4}

Objective = Callable[[Tensor, list[int]], Tensor]
"""[R] mean losses of a micro-batch's rows, and their places in the batch -> their share of what is minimized."""
UpperLoss = Callable[[Tensor], Tensor]
"""[R] mean losses of upper rows -> [R] what the upper level wants small in the mean."""


class BilevelCurate(Curate):
    """Scores are weights p_i of the candidates, trained by SEAL's penalty method (Shen et al., ICLR 2025).

    In a step, with l_i the mean loss over the label tokens of row i, the model descends
    c * mean_upper(u(l)) + (1 - c) * mean_i(p_i * l_i), and the selector mean_i(p_i * l_i) with l_i held fixed. So a
    candidate goes down whose loss is high under a model that the upper rows pull, and a row goes down too that was hard
    to begin with: while the model has moved little, this ranks by the base model's loss. p = N softmax(theta) over all
    N candidates or 2 sigmoid(theta), near 1 at first. The model descends by Adam (0.9, 0.95); rates are constant and
    gradients clipped at norm 1, all as in the official code. First derivatives alone; two forward and two backward
    passes.

    The official code has Adam for theta too. Since it divides by the size of a row's own gradients, what a row loses at
    a visit hardly depends on its loss, and where a step sees few of the candidates, a few epochs end close to chance:
    on a tiny model whose rows half contradict the upper ones, 40 of them, 5 a step, 3 epochs, a helpful row stood above
    a contradicting one in 36 to 55 % of pairs (softmax; five seeds), with plain gradient descent in 100 %. With Adam
    all rows in one step, or many epochs, are what helps.

    A candidate without a label token can't be judged and scores 0, the least. Without dropout, scores are the same for
    any split into micro-batches and ranks.

    Args:
        keep: share of the rows to keep, 0..1.
        epochs: passes over the candidates, >= 1. SEAL's script has 3.
        batch_size: candidates of a step over all ranks, and as many upper rows. SEAL's is 64.
        micro_batch: rows of a pass.
        lr: of the model. SEAL's is 1e-5, for some 5000 steps.
        selector_lr: of theta. SEAL's script has 5e-3, its default is 1e-2; for Adam both.
        adam: theta descends by Adam, as in SEAL's code, or else by its plain gradient.
        activation: softmax as in SEAL, or sigmoid.
        upper_weight: c in the first epoch, 0..1. SEAL's script has 1, its default is 0.9.
        upper_decay: what c loses an epoch, down to 0. SEAL's script has 0.03, its default is 0.1.
        seed: of the rows' order.
    """

    def __init__(
        self,
        keep: float,
        epochs: int,
        batch_size: int,
        micro_batch: int,
        lr: float,
        selector_lr: float,
        adam: bool,
        activation: Activation,
        upper_weight: float,
        upper_decay: float,
        seed: int,
    ) -> None:
        super().__init__(keep)
        self.epochs = epochs
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.lr = lr
        self.selector_lr = selector_lr
        self.adam = adam
        self.activation: Activation = activation
        self.upper_weight = upper_weight
        self.upper_decay = upper_decay
        self.seed = seed

    def trained(
        self, passes: Passes, packing: Packing, candidates: Examples, upper: Examples, upper_loss: UpperLoss
    ) -> Tensor:
        """[N] the weights p of the candidates. The model's weights are what they were afterwards.

        Raises:
            UserError: a loss is not finite, or no candidate has a label.
        """
        labelled = [i for i in range(len(candidates)) if candidates[i].supervised]
        if not labelled:
            raise UserError("No alignment row to choose from has a label token within data.max_length")
        # A row without loss would outweigh all others in the softmax.
        judged = Examples([candidates.rows[i] for i in labelled], candidates.encode)
        theta = torch.full((len(judged),), START[self.activation], device=passes.device, requires_grad=True)
        model = torch.optim.Adam(passes.weights, lr=self.lr, betas=BETAS)
        adam = torch.optim.Adam([theta], lr=self.selector_lr, betas=BETAS)
        selector = adam if self.adam else torch.optim.SGD([theta], lr=self.selector_lr)
        with passes.at(passes.weights):
            for step, (c, places, rows, others) in enumerate(self._batches(judged, upper)):
                passes.seed = int(np.random.default_rng([self.seed, step, passes.rank]).integers(2**62))
                p = weights(theta, self.activation)[places]
                pull = self._level(passes, packing, others, lambda losses, _, c=c: c * upper_loss(losses))
                own = p.detach()
                fit = self._level(passes, packing, rows, lambda losses, at, c=c, own=own: (1 - c) * own[at] * losses)
                _descend(model, passes.weights, [a + b for a, b in zip(pull.gradient, fit.gradient, strict=True)])
                # Not by the rows of an epoch's last, smaller step: its rows would fall further for it.
                loss = (p * fit.losses).sum() / self.batch_size
                self._require_finite(pull.loss + fit.loss + loss.item(), step)
                _descend(selector, [theta], torch.autograd.grad(loss, [theta]))
        for weight in passes.weights:
            weight.grad = None
        found = torch.zeros(len(candidates), device=passes.device)
        found[labelled] = weights(theta.detach(), self.activation)
        return found

    def _batches(
        self, candidates: Examples, upper: Examples
    ) -> Iterator[tuple[float, list[int], list[Example], list[Example]]]:
        """For each step: c, the candidates' places, the candidates, as many upper rows, which come round and round."""
        rounds = self._rounds(len(upper))
        for epoch in range(self.epochs):
            order = self._order(1, epoch, len(candidates))
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                others = [upper[i] for i in islice(rounds, len(places))]
                c = max(0.0, self.upper_weight - epoch * self.upper_decay)
                yield c, places, [candidates[i] for i in places], others

    def _rounds(self, size: int) -> Iterator[int]:
        for turn in count():
            yield from self._order(2, turn, size)

    def _order(self, level: int, epoch: int, size: int) -> list[int]:
        return np.random.default_rng([self.seed, level, epoch]).permutation(size).tolist()

    def _level(self, passes: Passes, packing: Packing, rows: Sequence[Example], objective: Objective) -> "_Level":
        """The mean of the objective over the rows that have a label."""
        count = max(1, sum(bool(row.supervised) for row in rows))
        micro = list(_micro_batches(rows, packing, self.micro_batch, passes))
        places = iter(micro)
        losses = torch.zeros(len(rows), device=passes.device)

        def share(packs: Sequence[Pack]) -> Tensor:
            at, _ = next(places)
            sums, labels = row_losses(passes.model, packs)
            found = sums / labels
            losses[at] = found.detach()
            return objective(found, at).sum() / count

        loss, gradient = passes.gradient(Batch("alignment", [packs for _, packs in micro], tokens=0), share)
        return _Level(loss, gradient, passes.summed([losses])[0])

    def _require_finite(self, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"A loss of step {step} of curating is {value}. A smaller curate.lr (now {self.lr}) may help."
            )


@dataclass(frozen=True, slots=True)
class _Level:
    """What a level's rows say, over all ranks."""

    loss: float
    gradient: list[Tensor]
    losses: Tensor
    """[B] each row's mean loss, 0 where it has no label."""


def weights(theta: Tensor, activation: Activation) -> Tensor:
    """[N] p of theta [N]; both are 1 where theta is nothing but zeros."""
    return len(theta) * theta.softmax(0) if activation == "softmax" else 2 * theta.sigmoid()


def _micro_batches(
    rows: Sequence[Example], packing: Packing, size: int, passes: Passes
) -> Iterator[tuple[list[int], list[Pack]]]:
    """This rank's share of a batch: the places in it of rows with a label, and their packs."""
    share = -(-len(rows) // passes.ranks)
    own = range(len(rows))[passes.rank * share : (passes.rank + 1) * share]
    for start in range(0, len(own), size):
        at = [i for i in own[start : start + size] if rows[i].supervised]
        if at:
            yield at, [p.to(passes.device) for p in packing([rows[i] for i in at])]


def _descend(optimizer: torch.optim.Optimizer, variables: Sequence[Tensor], gradient: Sequence[Tensor]) -> None:
    for variable, own in zip(variables, gradient, strict=True):
        variable.grad = own
    torch.nn.utils.clip_grad_norm_(variables, CLIP)
    optimizer.step()
