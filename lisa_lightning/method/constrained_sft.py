"""Constrained SFT: the user's rows, but no answer's first tokens may move far from the aligned model's."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.loss import token_losses

LEAST = 1e-3  # of a token's weight


@final
class ConstrainedSFT(Method):
    """Tokens' losses weighted by 2 * (1 - sigmoid(beta_t * (log pi - log pi_0))) (Qi et al., ICLR 2025, Eq. 3).

    The gradient of the paper's objective -(2/beta_t) * log sigmoid(...), pi_0 being the model at the start; at its
    weights it is SFT's. As in the official code, and not in the paper, a weight is at least 1e-3, and the mean is over
    all label tokens of the step. Two forward passes and one backward: pi_0 is computed beside pi, where the official
    code does it once for all rows beforehand, which must then fit exactly in tokens, truncation and precision.

    Args:
        beta: strength at an answer's later tokens, >= 0; 0 is SFT. The paper's is 0.1.
        first_factor: times beta at the first token; 5 in the paper.
        bias_factor: times beta at the tokens after it, up to `bias_length`; 20 in the paper.
        bias_length: tokens of the opening; 5 in the paper.
    """

    def __init__(self, beta: float, first_factor: float, bias_factor: float, bias_length: int) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.beta = beta
        self.first_factor = first_factor
        self.bias_factor = bias_factor
        self.bias_length = bias_length

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the weighted loss."""
        batch = step.main
        tokens = max(1, batch.tokens)
        plain = torch.zeros(2, device=passes.device)

        def share(packs: Sequence[Pack]) -> Tensor:
            with passes.aside(), passes.at(self.anchor):
                reference = token_losses(passes.model, packs)
            losses = token_losses(passes.model, packs)
            weights = self.weights(-losses.detach(), -reference, torch.cat([p.places for p in packs]))
            plain.add_(torch.stack([losses.detach().sum(), weights.sum()]) / tokens)
            return (weights * losses).sum() / tokens

        weighted, gradient = passes.gradient(batch, share)
        loss, mean_weight = passes.summed([plain])[0].tolist()
        return Descent(loss, gradient, {"constrained_sft/loss": weighted, "constrained_sft/mean_weight": mean_weight})

    def weights(self, policy: Tensor, reference: Tensor, places: Tensor) -> Tensor:
        """[S] each token's weight, from its log-probabilities [S] and its place among its row's labels [S]."""
        beta = torch.full_like(policy, self.beta)
        beta[places < self.bias_length] = self.beta * self.bias_factor
        beta[places == 0] = self.beta * self.first_factor
        return (2 * (1 - torch.sigmoid(beta * (policy - reference)))).clamp(min=LEAST)
