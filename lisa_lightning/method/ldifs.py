"""LDIFS: fine-tuning that keeps the features which the aligned model gives to the user's rows."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import mlp_blocks, outputs
from lisa_lightning.objective.backprop import Descent, Passes, norm
from lisa_lightning.objective.loss import completion_loss


@final
class LDIFS(Method):
    """sum_l rho/2 * ||MLP_l(x; w) - MLP_l(x; w0)||^2 beside the loss (Mukhoti et al., 2024, as Booster's code has it).

    Summed over the positions of all rows up to their last predictor, not averaged; w0 are the weights at the start. Two
    forward passes and one backward; no second copy of the model, since w0 differs from w in the adapter alone. The last
    three arguments are the official code's: it drops a layer's term for a step where it is 0.1 or more (a guard
    against NaN, which switches the penalty off where features moved most; two more forward passes here, since the term
    is that of the whole step), clips the gradient to 5 before the trainer does, and counts padding, which a step's rows
    must then not be split for; it is of id 0, as in the recorded cases (where a model has no padding token, a run of
    that code adds one).

    Args:
        rho: factor, >= 0; 0 is SFT. The official code's is 1e-4.
        drop_threshold: a layer's term from which on it is dropped, or None.
        inner_clip: the largest gradient norm before `optim.clip`, or None.
        padding: count the features of padding too.
    """

    def __init__(self, rho: float, drop_threshold: float | None, inner_clip: float | None, padding: bool) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.needs = frozenset({"undivided steps"} if padding else ())
        self.rho = rho
        self.drop_threshold = drop_threshold
        self.inner_clip = inner_clip
        self.padding = padding
        self.rows_apart = frozenset({"user"} if padding else ())
        self.blocks: list[nn.Module] = []

    def prepare(self, passes: Passes) -> None:
        """Find the blocks."""
        self.blocks = mlp_blocks(passes.model)

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the loss and the penalty."""
        batch = step.main
        mean_loss = passes.mean_loss(batch)
        sums = torch.zeros(len(self.blocks), device=passes.device)
        keep = [True] * len(sums)
        if self.drop_threshold is not None and self.rho > 0:
            keep = (self._terms_of(passes, batch) < self.drop_threshold).tolist()
        alone = torch.zeros((), device=passes.device)

        def share(packs: Sequence[Pack]) -> Tensor:
            with passes.aside(), passes.at(self.anchor), outputs(self.blocks) as wanted:
                mean_loss(packs)
            with outputs(self.blocks) as found:
                loss = mean_loss(packs)
            terms = self._terms(found, wanted, packs)
            sums.add_(torch.stack(terms).detach())
            alone.add_(loss.detach())
            return loss + sum(term for term, kept in zip(terms, keep, strict=True) if kept)  # 0 * NaN would be NaN

        loss, gradient = passes.gradient(batch, share if self.rho > 0 else None)
        if self.rho == 0:
            return Descent(loss, gradient, {"ldifs/penalty": 0.0})
        sums, alone = passes.summed([sums, alone])
        metrics = {"ldifs/penalty": sums[keep].sum().item()}
        if self.inner_clip is not None:
            length = norm(gradient)
            scale = (self.inner_clip / (length + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
            gradient = [g * scale for g in gradient]
            metrics["ldifs/gradient_norm"] = length.item()
        if self.drop_threshold is not None:
            metrics["ldifs/layers_kept"] = float(sum(keep))
        return Descent(alone.item(), gradient, metrics)

    def _terms_of(self, passes: Passes, batch: Batch) -> Tensor:
        """[layers] the whole step's terms."""
        total = torch.zeros(len(self.blocks), device=passes.device)
        for packs in passes.micro_batches(batch):
            with passes.aside(), passes.at(self.anchor), outputs(self.blocks) as wanted:
                completion_loss(passes.model, packs)
            with torch.no_grad(), outputs(self.blocks) as found:
                completion_loss(passes.model, packs)
            total += torch.stack(self._terms(found, wanted, packs))
        return passes.summed([total])[0]

    def _terms(self, found: Sequence[Tensor], wanted: Sequence[Tensor], packs: Sequence[Pack]) -> list[Tensor]:
        """A micro-batch's term of each layer; features come pack by pack, layer by layer."""
        terms = []
        for layer in range(len(self.blocks)):
            term = torch.zeros((), device=found[0].device)
            for i, p in enumerate(packs):
                at = i * len(self.blocks) + layer
                rows = torch.ones_like(p.shared_by) if self.padding else p.shared_by
                squares = (found[at] - wanted[at]).float().square().sum(-1)
                term = term + (rows * squares.view_as(rows)).sum()
            terms.append(self.rho / 2 * term)
        return terms
