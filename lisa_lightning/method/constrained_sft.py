"""Constrained SFT: fine-tuning that keeps the first tokens of every answer close to the aligned model's."""

from collections.abc import Sequence
from typing import Final, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, NonNegative
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.loss import token_losses

MIN_WEIGHT: Final = 1e-3
"""Smallest weight of a token's loss, as in the official code."""


@final
@dataclass(frozen=True, config=STRICT)
class ConstrainedSFT(Method):
    """Weight each token's loss by 2 * (1 - sigmoid(beta_t * (log pi - log pi_0))) (Qi et al., ICLR 2025, Eq. 3).

    The result is the gradient of the paper's objective -(2/beta_t) * log sigmoid(beta_t * (log pi - log pi_0)), where
    pi_0 is the model at the start. At its weights it equals SFT.

    Two forward passes and one backward. pi_0 is computed next to pi. The official code computes it once for all rows,
    which must then match exactly in tokens, truncation and precision.

    Departures of the official code from the paper, followed here:
        - A weight is at least 1e-3.
        - The mean is over all supervised tokens of the step.
    """

    beta: NonNegative = 0.1
    """Strength at an answer's later tokens; 0 is SFT. The paper's value, as all below."""
    first_factor: NonNegative = 5
    """Factor of beta at the first token."""
    bias_factor: NonNegative = 20
    """Factor of beta at the next tokens, up to `bias_length`."""
    bias_length: Count = 5
    """Number of tokens of the opening."""

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the weighted loss."""
        tokens = max(1, step.main.tokens)
        totals = torch.zeros(2, device=backprop.device)

        def weighted_loss(packs: Sequence[Pack], _: int) -> Tensor:
            with backprop.reference_pass(state["anchor"]):
                reference = token_losses(backprop.model, packs)
            losses = token_losses(backprop.model, packs)
            weights = self.weights(-losses.detach(), -reference, torch.cat([p.label_index for p in packs]))
            totals.add_(torch.stack([losses.detach().sum(), weights.sum()]) / tokens)
            return (weights * losses).sum() / tokens

        weighted, gradients = backprop.gradient(step.main, weighted_loss)
        loss, mean_weight = backprop.all_reduce_sum([totals])[0].tolist()
        metrics = {"constrained_sft/loss": weighted, "constrained_sft/mean_weight": mean_weight}
        return StepOutput(loss, gradients, metrics)

    def weights(self, policy: Tensor, reference: Tensor, label_index: Tensor) -> Tensor:
        """Return the weight of each token's loss.

        Args:
            policy: [S] log-probabilities under the model.
            reference: [S] log-probabilities under the model at the start.
            label_index: [S] index of each token among the labels of its row.

        Returns:
            [S] weights, from 1e-3 to 2.
        """
        beta = torch.full_like(policy, self.beta)
        beta[label_index < self.bias_length] = self.beta * self.bias_factor
        beta[label_index == 0] = self.beta * self.first_factor
        return (2 * (1 - torch.sigmoid(beta * (policy - reference)))).clamp(min=MIN_WEIGHT)
