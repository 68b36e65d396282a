"""LDIFS: fine-tuning that preserves the aligned model's features of the user's rows."""

from collections.abc import Sequence
from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, NonNegative, Positive
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import capture_outputs
from lisa_lightning.objective.backprop import Backprop, State, StepOutput, clip
from lisa_lightning.objective.loss import completion_loss


@final
@dataclass(frozen=True, config=STRICT)
class LDIFS(Method):
    """Add sum_l rho/2 * ||MLP_l(x; w) - MLP_l(x; w0)||^2 to the loss (Mukhoti et al., 2024, as in Booster's code).

    The sum, not the mean, is over the positions of all rows up to their last predictor; w0 are the weights at the
    start. Two forward passes and one backward. There is no second copy of the model, since w0 differs in the trained
    weights only.

    Departures of the official code, each an option:
        - `drop_threshold`: a layer's term is dropped for a step if it is 0.1 or more. This guard against NaN turns the
          penalty off where features moved most. It costs two more forward passes here, since the term is that of the
          whole step.
        - `inner_clip`: the gradient is clipped to 5 before the trainer clips it.
        - `padding`: features of padding count, so that the rows of a step must not be split. Padding has id 0, as in
          the recorded cases. (The official code adds a padding token to a model that has none.)
    """

    rho: NonNegative = 1e-4
    """Factor of the penalty; 0 is SFT. The official code has 1e-4."""
    drop_threshold: Positive | None = None
    """Value of a layer's term from which it is dropped; None drops none. The official code has 0.1."""
    inner_clip: Positive | None = None
    """Largest gradient norm before `optim.clip`; None for no clipping. The official code has 5."""
    padding: bool = False
    """Count the features of padding, as the official code does."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """One micro-batch, if padding counts."""
        return frozenset({"single_micro_batch"} if self.padding else ())

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """The user's rows, if padding counts."""
        return frozenset({"user"} if self.padding else ())

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if a layer has no MLP block."""
        _ = backprop.mlp_blocks
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the penalty."""
        batch, anchor = step.main, state["anchor"]
        mean_loss = backprop.mean_loss(batch)
        if self.rho == 0:
            return StepOutput(*backprop.gradient(batch), {"ldifs/penalty": 0.0})
        terms_total = torch.zeros(len(backprop.mlp_blocks), device=backprop.device)
        active = [True] * len(terms_total)
        if self.drop_threshold is not None:
            active = (self._step_terms(backprop, batch, anchor) < self.drop_threshold).tolist()
        loss_total = torch.zeros((), device=backprop.device)

        def penalized_loss(packs: Sequence[Pack], index: int) -> Tensor:
            with backprop.reference_pass(anchor), capture_outputs(backprop.mlp_blocks) as reference:
                mean_loss(packs, index)
            with capture_outputs(backprop.mlp_blocks) as features:
                loss = mean_loss(packs, index)
            terms = self._terms(features, reference, packs)
            terms_total.add_(torch.stack(terms).detach())
            loss_total.add_(loss.detach())
            # A dropped term is left out: 0 * NaN would be NaN.
            return loss + sum(term for term, is_active in zip(terms, active, strict=True) if is_active)

        _, gradients = backprop.gradient(batch, penalized_loss)
        terms_total, loss_total = backprop.all_reduce_sum([terms_total, loss_total])
        metrics = {"ldifs/penalty": terms_total[active].sum().item()}
        if self.inner_clip is not None:
            gradients, length = clip(gradients, self.inner_clip)
            metrics["ldifs/gradient_norm"] = length.item()
        if self.drop_threshold is not None:
            metrics["ldifs/layers_kept"] = float(sum(active))
        return StepOutput(loss_total.item(), gradients, metrics)

    def _step_terms(self, backprop: Backprop, batch: Batch, anchor: Sequence[Tensor]) -> Tensor:
        """Return the terms of the whole step, [layers]."""
        total = torch.zeros(len(backprop.mlp_blocks), device=backprop.device)
        for packs in backprop.micro_batches(batch):
            with backprop.reference_pass(anchor), capture_outputs(backprop.mlp_blocks) as reference:
                completion_loss(backprop.model, packs)
            with torch.no_grad(), capture_outputs(backprop.mlp_blocks) as features:
                completion_loss(backprop.model, packs)
            total += torch.stack(self._terms(features, reference, packs))
        return backprop.all_reduce_sum([total])[0]

    def _terms(self, features: Sequence[Tensor], reference: Sequence[Tensor], packs: Sequence[Pack]) -> list[Tensor]:
        """Return a micro-batch's term of each layer; features are ordered by pack, then by layer."""
        layers = len(features) // len(packs)
        terms = []
        for layer in range(layers):
            term = torch.zeros((), device=features[0].device)
            for index, packed in enumerate(packs):
                at = index * layers + layer
                counts = packed.token_count if self.padding else packed.row_count
                squares = (features[at] - reference[at]).float().square().sum(-1)
                term = term + (counts * squares.view_as(counts)).sum()
            terms.append(self.rho / 2 * term)
        return terms
