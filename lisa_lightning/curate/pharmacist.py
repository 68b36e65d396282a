"""Pharmacist: keep the rows whose training step most improves held-out alignment after a simulated attack."""

from collections.abc import Sequence
from itertools import islice
from typing import Final, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, CountOrZero, OpenShare, Positive, Seed
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.curate._progress import Progress
from lisa_lightning.curate._row_losses import (
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
from lisa_lightning.objective.backprop import norm
from lisa_lightning.objective.loss import no_autocast
from lisa_lightning.runtime.errors import UserError

CANDIDATES: Final = 1
HELD_OUT: Final = 2
HARMFUL: Final = 3
WARMUP: Final = 4
SPLIT: Final = 0
"""Parts of the seed of each order of rows, and of the draw of held-out rows."""
TINY: Final = 1e-30


@final
@dataclass(frozen=True, config=STRICT)
class Pharmacist(Selector):
    """Rank alignment rows by their share in surviving an attack (Liu et al., arXiv 2510.10085, Eq. 1 to 6).

    f is the mean loss on held-out alignment rows, h that on harmful rows, and g_i that of candidate i. The logits w
    minimize

        f(theta* - alpha * grad h(theta*)),  theta* = theta_0 - eta * sum_i gamma_i * grad g_i(theta_0)

    where gamma = softmax(w) over all N candidates. In words: train a step on the weighted rows, let an attacker train a
    step on harmful rows, and ask that held-out alignment rows are still answered. theta_0 is the adapter of alignment
    after `warmup_steps` on all alignment rows. Every step starts at theta_0, so the model is not trained along.

    A step has a batch of candidates, whose sum stands for that over all N by the factor N/batch. With

        v = grad f(theta* - alpha * grad h(theta*)),  s_i = <v, grad g_i(theta_0)>

    and the Hessian of h replaced by the identity, as published, the update is

        w_j <- w_j + selector_lr * (1 - alpha) * eta * N/batch * gamma_j * (s_j - sum_i gamma_i * s_i)

    where s_j is 0 for a candidate outside the batch. s is the central difference of the candidates' losses along v. So
    no gradient of a single row is computed. These losses are computed without autocast, whose rounding exceeds their
    differences.

    A step takes 3F 1B over its candidates, and 1F 1B over each of the held-out and the harmful batch. The memory is
    that of six more adapters.

    Objective and update are as published, except for the factor N/batch. All step sizes and batch sizes are ours, since
    the paper has none. There is no official code.

    Held-out rows are drawn by the seed. They are no candidates and score 0, so they are kept only if `keep` exceeds the
    number of candidates. The same holds for rows without a label token.
    """

    keep: Keep = 0.4
    """Share of the rows to keep, or their number if above 1. The paper keeps 5000 rows, by its times 40 %."""
    validation_rows: Count = 200
    """Alignment rows that are held out. The paper's value is 200."""
    warmup_steps: CountOrZero = 200
    """Steps on all alignment rows before the selection. The paper's value is 200."""
    epochs: Count = 1
    """Passes over the candidates."""
    batch_size: Count = 32
    """Candidates of a step over all ranks, and rows of a warm-up step."""
    attack_batch: Count = 8
    """Held-out rows of a step over all ranks, and as many harmful rows."""
    micro_batch: Count = 8
    """Rows of a forward pass."""
    warmup_lr: Positive = 1e-3
    """Learning rate of Adam in the warm-up."""
    inner_lr: Positive = 0.1
    """eta, the size of the step on weighted rows."""
    attack_lr: OpenShare = 0.1
    """alpha, the size of the attacker's step."""
    selector_lr: Positive = 10.0
    """Learning rate of the logits, which plain gradient descent trains."""
    seed: Seed = 0
    """Seed of the held-out rows and of the order of rows."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider."""
        return frozenset({"defender_rows"})

    def scores(self, candidates: Candidates) -> Tensor:
        """Return N * softmax(w) for the N candidates and 0 for other rows, in the order of the alignment rows.

        Raises:
            UserError: if there is no harmful row or no candidate, or a loss is not finite.
        """
        rows, defender = candidates.alignment, candidates.defender
        if not len(defender):
            raise UserError(
                "curate=pharmacist: needs defender rows, and source.defender has none. "
                "Fix: add harmful rows to source.defender"
            )
        held_out, trained = self._split(labelled_rows(rows))
        row_backprop = RowBackprop(*candidates.make_model(), self.micro_batch)
        with row_backprop.backprop.swapped_weights(row_backprop.backprop.weights):
            step, saved = candidates.progress.load() if candidates.progress else (0, {})
            if saved:
                row_backprop.backprop.set_weights([saved[name] for name in row_backprop.backprop.names])
                if (scale := row_backprop.backprop.loss_scale) is not None:
                    value, good_steps = saved["loss_scale"].tolist()
                    scale.load_state_dict({"value": value, "good_steps": int(good_steps)})
            else:
                self.warm_up(row_backprop, rows.subset([*held_out, *trained]))
            logits = self.fit_logits(
                row_backprop,
                rows.subset(trained),
                rows.subset(held_out),
                defender,
                saved.get("logits", torch.zeros(len(trained))).to(row_backprop.backprop.device),
                step,
                candidates.progress,
            )
        scores = torch.zeros(len(rows), device=logits.device)
        scores[trained] = len(trained) * logits.softmax(0)
        return scores

    def _split(self, labelled: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the indices of the held-out rows and of the candidates. Raises UserError without a candidate."""
        if len(labelled) <= self.validation_rows:
            raise UserError(
                f"curate.validation_rows={self.validation_rows}: leaves no candidate of {len(labelled)} alignment rows "
                f"with a label. Fix: curate.validation_rows={max(1, len(labelled) // 2)} or less"
            )
        order = [labelled[i] for i in shuffled([self.seed, SPLIT], len(labelled))]
        return order[: self.validation_rows], sorted(order[self.validation_rows :])

    def warm_up(self, row_backprop: RowBackprop, rows: Examples) -> None:
        """Train the adapter on all alignment rows by Adam."""
        backprop = row_backprop.backprop
        optimizer = torch.optim.Adam(backprop.weights, lr=self.warmup_lr)
        batches = iter_batches([self.seed, WARMUP], len(rows), self.batch_size)
        for step, indices in zip(range(self.warmup_steps), batches, strict=False):
            backprop.seed = step_seed(self.seed, step, backprop.rank)
            batch = [rows[i] for i in indices]
            output = backprop.skip_on_overflow(lambda batch=batch: row_backprop.gradients(batch, _mean_loss))
            if output is None:
                continue
            require_finite(output.value, step, "curate.warmup_lr", self.warmup_lr)
            for weight, gradient in zip(backprop.weights, output.gradients, strict=True):
                weight.grad = gradient
            optimizer.step()
        for weight in backprop.weights:
            weight.grad = None

    def fit_logits(
        self,
        row_backprop: RowBackprop,
        candidates: Examples,
        held_out: Examples,
        harmful: Examples,
        logits: Tensor,
        first_step: int = 0,
        progress: Progress | None = None,
    ) -> Tensor:
        """Return the logits w of the candidates after the remaining steps, [N].

        Args:
            row_backprop: the model at theta_0.
            candidates: the rows to rank.
            held_out: alignment rows that are not ranked.
            harmful: harmful rows of the provider.
            logits: w before the first step.
            first_step: number of finished steps.
            progress: file to save the progress in.
        """
        theta_0 = dict(zip(row_backprop.backprop.names, row_backprop.backprop.weights, strict=True))
        held_out_batches = islice(
            iter_batches([self.seed, HELD_OUT], len(held_out), self.attack_batch), first_step, None
        )
        harmful_batches = islice(iter_batches([self.seed, HARMFUL], len(harmful), self.attack_batch), first_step, None)
        batches = self._candidate_batches(len(candidates))
        for step, indices in enumerate(batches[first_step:], first_step):
            if progress and row_backprop.backprop.rank == 0:
                tensors = {**theta_0, "logits": logits}
                if (scale := row_backprop.backprop.loss_scale) is not None:
                    tensors["loss_scale"] = torch.tensor([scale.value, scale.good_steps])
                progress.save(step, tensors)
            row_backprop.backprop.seed = step_seed(self.seed, self.warmup_steps + step, row_backprop.backprop.rank)
            update = self.logit_update(
                row_backprop,
                logits,
                indices,
                [candidates[i] for i in indices],
                [held_out[i] for i in next(held_out_batches)],
                [harmful[i] for i in next(harmful_batches)],
            )
            if update is not None:
                require_finite(update.sum().item(), step, "curate.inner_lr", self.inner_lr)
                logits = logits + self.selector_lr * update
        return logits

    def logit_update(
        self,
        row_backprop: RowBackprop,
        logits: Tensor,
        indices: Sequence[int],
        candidates: Sequence[Example],
        held_out: Sequence[Example],
        harmful: Sequence[Example],
    ) -> Tensor | None:
        """Return the direction in which the logits w ascend, [N]; None if a gradient overflows in float16.

        The model's weights are theta_0, and unchanged afterwards.

        Args:
            row_backprop: the model.
            logits: w of all N candidates.
            indices: indices of the batch's candidates.
            candidates: rows of these indices.
            held_out: a batch of held-out rows.
            harmful: a batch of harmful rows.
        """
        gamma = logits.softmax(0)
        weights = len(logits) / len(indices) * gamma[indices]
        held_out_gradient = row_backprop.backprop.skip_on_overflow(
            lambda: self._held_out_gradient(row_backprop, weights, candidates, held_out, harmful)
        )
        if held_out_gradient is None:
            return None
        agreement = gamma[indices] * directional_derivatives(row_backprop, candidates, held_out_gradient).to(
            gamma.dtype
        )
        change = -gamma * agreement.sum()
        change[indices] += agreement
        return (1 - self.attack_lr) * self.inner_lr * len(logits) / len(indices) * change

    def _held_out_gradient(
        self,
        row_backprop: RowBackprop,
        weights: Tensor,
        candidates: Sequence[Example],
        held_out: Sequence[Example],
        harmful: Sequence[Example],
    ) -> list[Tensor]:
        """Return v, the gradient of the held-out rows' loss after the step on weighted rows and the attack."""
        backprop = row_backprop.backprop
        # The objective's mean is multiplied by the number of rows, since Eq. 1 has a sum.
        size = len(candidates)
        inner = row_backprop.gradients(candidates, lambda losses, rows: size * weights[rows] * losses).gradients
        trained = _step(backprop.weights, inner, self.inner_lr)
        with backprop.swapped_weights(trained):
            attack = row_backprop.gradients(harmful, _mean_loss).gradients
        with backprop.swapped_weights(_step(trained, attack, self.attack_lr)):
            return row_backprop.gradients(held_out, _mean_loss).gradients

    def _candidate_batches(self, size: int) -> list[list[int]]:
        """Return the indices of the candidates of each step."""
        orders = [shuffled([self.seed, CANDIDATES, epoch], size) for epoch in range(self.epochs)]
        return [order[i : i + self.batch_size] for order in orders for i in range(0, size, self.batch_size)]


def directional_derivatives(row_backprop: RowBackprop, rows: Sequence[Example], direction: Sequence[Tensor]) -> Tensor:
    """Return <direction, grad g_i> for the mean loss g_i of each row, [B], by a central difference.

    The weights move by the cube root of the model's precision, which balances truncation and rounding. There is no
    autocast.
    """
    backprop = row_backprop.backprop
    length = norm(direction) + TINY
    distance = torch.finfo(backprop.model.dtype).eps ** (1 / 3)
    losses = []
    for sign in (1, -1):
        moved = [w.detach() + sign * distance / length * d for w, d in zip(backprop.weights, direction, strict=True)]
        with no_autocast(backprop.device), backprop.swapped_weights(moved):
            losses.append(row_backprop.losses(rows))
    return (losses[0] - losses[1]) / (2 * distance) * length


def _step(weights: Sequence[Tensor], gradients: Sequence[Tensor], lr: float) -> list[Tensor]:
    return [w.detach() - lr * g for w, g in zip(weights, gradients, strict=True)]


def _mean_loss(losses: Tensor, _: list[int]) -> Tensor:
    return losses
