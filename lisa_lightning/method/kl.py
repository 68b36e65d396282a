"""KL: fine-tuning whose predictions for the user's rows stay near those of the aligned model."""

from collections.abc import Sequence
from typing import Literal, final

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, NonNegative
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.divergence import kl_to_anchor
from lisa_lightning.objective.loss import all_logits, label_logits


@final
@dataclass(frozen=True, config=STRICT)
class KL(Method):
    """Add beta * KL(pi_0 || pi) to the loss (a baseline in the code of Huang et al., NeurIPS 2024, Vaccine).

    pi_0 is the model at the start. Two forward passes and one backward. There is no second copy of the model, since
    pi_0 differs in the trained weights only. Memory: the logits of both models at the compared positions.

    The official code, as `over: positions`:
        - The softmax is over the positions of a row, for each entry of the vocabulary. `over: vocabulary` mends this
          defect alone.
        - All positions count, prompt and padding included. So the rows of a step must not be split. Padding has id 0,
          as in the recorded cases.
        - The sum is divided by the number of rows, not of tokens. So beta depends on the length of the rows.
        - It draws separate dropout masks for pi_0, pi and the cross-entropy, in three forward passes. The recorded
          cases have no dropout.
    """

    beta: NonNegative = 1.0
    """Factor of the penalty; 0 is SFT. The official script for SST-2 has 0.1, as lamb, with `over: positions`."""
    over: Literal["labels", "vocabulary", "positions"] = "labels"
    """Compared distributions. `labels`: over the vocabulary at positions that predict a label, the mean over these.
    `vocabulary`: the same at all positions, the sum divided by the number of rows. `positions`, as in the official
    code: over the positions, for each entry of the vocabulary, the sum divided by the number of rows."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """One micro-batch, if padding counts."""
        return frozenset(() if self.over == "labels" else {"single_micro_batch"})

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """The user's rows, if padding counts."""
        return frozenset(() if self.over == "labels" else {"user"})

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the penalty."""
        if self.beta == 0:
            return StepOutput(*backprop.gradient(step.main), {"kl/penalty": 0.0})
        tokens = max(1, step.main.tokens)
        totals = torch.zeros(2, device=backprop.device)

        def penalized_loss(packs: Sequence[Pack], _: int) -> Tensor:
            if self.over == "labels":
                divergence, logits = kl_to_anchor(backprop, state["anchor"], packs, label_logits)
                count = tokens
            else:
                dim = 1 if self.over == "positions" else -1
                divergence, logits = kl_to_anchor(backprop, state["anchor"], packs, all_logits, dim)
                count = len(logits)
                logits = logits.flatten(0, 1)[packs[0].logit_positions]
            targets = torch.cat([p.targets for p in packs])
            loss = F.cross_entropy(logits.float(), targets, reduction="sum") / tokens
            penalty = self.beta / count * divergence
            totals.add_(torch.stack([loss, penalty]).detach())
            return loss + penalty

        _, gradients = backprop.gradient(step.main, penalized_loss)
        loss, penalty = backprop.all_reduce_sum([totals])[0].tolist()
        return StepOutput(loss, gradients, {"kl/penalty": penalty})
