"""SEAL on alignment rows: keep the rows that have a low loss under a model trained on the other half."""

from collections.abc import Iterator
from typing import Final, Literal, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, Positive, Seed, Share
from lisa_lightning.curate._row_losses import (
    ObjectiveGradients,
    RowBackprop,
    iter_batches,
    labelled_rows,
    require_finite,
    shuffled,
    step_seed,
)
from lisa_lightning.curate.base import Candidates, Keep, Selector
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Example
from lisa_lightning.runtime.errors import UserError

Activation = Literal["softmax", "sigmoid"]
BETAS: Final = (0.9, 0.95)
CLIP: Final = 1.0
INITIAL_THETA: Final = {"softmax": 0.1, "sigmoid": -1e-4}


@final
@dataclass(frozen=True, config=STRICT)
class SEAL(Selector):
    """SEAL's selector (Shen et al., ICLR 2025) with held-out alignment rows as the safe set. Scores are weights p.

    SEAL selects among the user's rows and has a trusted safe set. In this setting the candidates are the alignment rows
    themselves, and no safer rows exist. So the seed splits them into halves. Each half is scored with the other as
    upper rows, in two trainings that both start at the fresh adapter. Every row gets a score, at the cost of one
    training. With softmax the mean score is 1 in each half.

    The penalty method: with l_i the mean loss over the label tokens of row i, each step lets the model descend

        c * mean_upper(l) + (1 - c) * mean_i(p_i * l_i)

    and the selector

        mean_i(p_i * l_i)

    with l_i held fixed. p is near 1 at first, and is N * softmax(theta) over all N candidates or 2 * sigmoid(theta). A
    candidate is ranked down if its loss is high under a model that the upper rows pull. A row that was difficult from
    the start is ranked down too: while the model has moved little, the ranking is that of the base model's loss. So the
    selector finds rows at odds with most others, not rows that matter for safety.

    As in the official code, the model descends by Adam (0.9, 0.95) at a constant rate, gradients are clipped at norm 1,
    and second derivatives are dropped. Two forward and two backward passes a step.

    Departures from the official code:
        - An epoch is a pass over the candidates. In the official code it ends with the shorter set.
        - The model is the base model with the adapter of alignment. In the official code it is an aligned model.
        - The number of kept rows is rounded. In the official code it is truncated.
        - `adam`: the official code uses Adam for theta too. Adam divides by the size of a row's gradients, so that the
          loss of a row hardly changes how far it falls per visit. If a step has few of the candidates, a few epochs end
          close to chance. Measured on a tiny model with 40 rows, half of which contradict the upper rows, 5 rows a
          step, 3 epochs, softmax, five seeds: a helpful row ranked above a contradicting one in 36 to 55 % of pairs,
          with plain gradient descent in 100 %. With Adam, put all rows into one step or train for many epochs.

    A candidate without a label token scores 0, the lowest. Without dropout, scores are the same for any split into
    micro-batches and ranks.
    """

    keep: Keep = 0.8
    """Share of the rows to keep, or their number if above 1. SEAL's script has 0.8."""
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
    """Seed of the halves and of the order of rows."""

    def scores(self, candidates: Candidates) -> Tensor:
        """Return the weights of the alignment rows, from these rows and the model.

        Raises:
            UserError: if there are fewer than two rows, no row has a label, or a loss is not finite.
        """
        rows, size = candidates.alignment, len(candidates.alignment)
        if size < 2:
            raise UserError(
                f"curate=seal: needs at least 2 alignment rows, one for each half, but there is only {size}. "
                "Fix: add rows to source.alignment"
            )
        row_backprop = RowBackprop(*candidates.make_model(), self.micro_batch)
        order = shuffled([self.seed, 0], size)
        halves = order[: size // 2], order[size // 2 :]
        first, second = (rows.subset(half) for half in halves)
        scores = torch.zeros(size, device=row_backprop.backprop.device)
        scores[halves[0]] = self.fit_weights(row_backprop, first, second)
        scores[halves[1]] = self.fit_weights(row_backprop, second, first)
        return scores

    def fit_weights(self, row_backprop: RowBackprop, candidates: Examples, upper: Examples) -> Tensor:
        """Return the weights p of the N candidates, [N]. The model's weights are unchanged afterwards.

        Args:
            row_backprop: the model; it is trained from its present weights.
            candidates: the rows to weight.
            upper: the rows of the upper level.

        Raises:
            UserError: if a loss is not finite, or no candidate has a label.
        """
        backprop, label_rows = row_backprop.backprop, labelled_rows(candidates)
        # A row without loss would outweigh all others in the softmax.
        labelled = candidates.subset(label_rows)
        theta = torch.full((len(labelled),), INITIAL_THETA[self.activation], device=backprop.device, requires_grad=True)
        model_optimizer = torch.optim.Adam(backprop.weights, lr=self.lr, betas=BETAS)
        adam = torch.optim.Adam([theta], lr=self.selector_lr, betas=BETAS)
        theta_optimizer = adam if self.adam else torch.optim.SGD([theta], lr=self.selector_lr)
        with backprop.swapped_weights(backprop.weights):
            for step, (c, indices, batch, upper_batch) in enumerate(self._batches(labelled, upper)):
                backprop.seed = step_seed(self.seed, step, backprop.rank)
                p = row_weights(theta, self.activation)[indices]
                levels = self._levels(row_backprop, c, p.detach(), batch, upper_batch)
                if levels is None:
                    continue
                upper_level, lower_level = levels
                gradients = zip(upper_level.gradients, lower_level.gradients, strict=True)
                _descend(model_optimizer, backprop.weights, [a + b for a, b in gradients])
                # The divisor is constant, since the rows of an epoch's smaller last step would fall further otherwise.
                loss = (p * lower_level.losses).sum() / self.batch_size
                require_finite(upper_level.value + lower_level.value + loss.item(), step, "curate.lr", self.lr)
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
        upper_indices = (i for batch in iter_batches([self.seed, 2], len(upper), 1) for i in batch)
        for epoch in range(self.epochs):
            order = shuffled([self.seed, 1, epoch], len(candidates))
            for start in range(0, len(order), self.batch_size):
                indices = order[start : start + self.batch_size]
                upper_batch = [upper[next(upper_indices)] for _ in indices]
                c = max(0.0, self.upper_weight - epoch * self.upper_decay)
                yield c, indices, [candidates[i] for i in indices], upper_batch

    def _levels(
        self, row_backprop: RowBackprop, c: float, p: Tensor, batch: list[Example], upper_batch: list[Example]
    ) -> tuple[ObjectiveGradients, ObjectiveGradients] | None:
        """Return value and gradients of the upper and the lower level, or None if a gradient overflows in float16."""
        return row_backprop.backprop.skip_on_overflow(
            lambda: (
                row_backprop.gradients(upper_batch, lambda losses, _: c * losses),
                row_backprop.gradients(batch, lambda losses, rows: (1 - c) * p[rows] * losses),
            )
        )


def row_weights(theta: Tensor, activation: Activation) -> Tensor:
    """Return p of theta, both [N]. With theta = 0 all weights are 1."""
    return len(theta) * theta.softmax(0) if activation == "softmax" else 2 * theta.sigmoid()


def _descend(
    optimizer: torch.optim.Optimizer, variables: list[Tensor], gradients: list[Tensor] | tuple[Tensor, ...]
) -> None:
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.grad = gradient
    torch.nn.utils.clip_grad_norm_(variables, CLIP)
    optimizer.step()
