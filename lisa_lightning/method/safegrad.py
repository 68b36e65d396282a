"""SafeGrad, reconstructed: project the user's gradient off the gradient of a KL divergence on alignment rows."""

from collections.abc import Sequence
from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, NonNegative
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.divergence import kl_to_anchor
from lisa_lightning.objective.loss import label_logits


@final
@dataclass(frozen=True, config=STRICT)
class SafeGrad(Method):
    """A reconstruction of SafeGrad (arXiv 2508.07172, ICASSP 2026) from the abstract alone.

    It descends along

        g_u' + lamb * g_a,  g_u' = g_u - min(0, <g_u, g_a>) / ||g_a||^2 * g_a

    where g_u is the gradient of the loss on the user's rows and g_a that of KL(pi_0 || pi) on alignment rows. pi_0 is
    the model at the start. At its weights KL and g_a are exactly zero, so that the first step equals SFT.

    From the abstract: both losses, the projection of the user's gradient in case of conflict, and the two objectives.

    Choices of this reconstruction, checked against neither paper nor code:
        - lamb, and the number of alignment rows a step.
        - The direction of the KL, without a temperature. It is the mean over the label tokens of the alignment rows.
        - One inner product over all trainable weights, without an epsilon.
        - Clipping after the projection.

    Its results do not measure the published method. One forward and one backward pass over the user's rows, two forward
    and one backward over the alignment rows. Memory: a second gradient, and the logits of both models.
    """

    lamb: NonNegative = 1.0
    """Factor of the alignment gradient; 0 only projects. The abstract has none."""
    safe_rows: Count = 4
    """Alignment rows a step. The abstract has none; it reports that some 20 rows in all are enough."""

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of user rows and `safe_rows` alignment rows."""
        return {"user": StreamBatch(step), "alignment": StreamBatch(step, self.safe_rows)}

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the projected gradient of the user's loss plus the alignment gradient."""
        batch = step.batches["alignment"]
        tokens = max(1, batch.tokens)

        def mean_kl(packs: Sequence[Pack], _: int) -> Tensor:
            return kl_to_anchor(backprop, state["anchor"], packs, label_logits)[0] / tokens

        loss, user_gradients = backprop.gradient(step.main)
        kl, alignment_gradients = backprop.gradient(batch, mean_kl)
        projected, conflicts = remove_conflict(user_gradients, alignment_gradients)
        gradients = [user + self.lamb * safe for user, safe in zip(projected, alignment_gradients, strict=True)]
        return StepOutput(loss, gradients, {"safegrad/kl": kl, "safegrad/conflict": float(conflicts)})


def remove_conflict(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """Return gradients without the component that opposes the reference gradients, and whether there was one.

    All tensors together are one vector. Without a conflict, or with a reference of zero, the gradients are unchanged.
    """
    inner = torch.stack([(g * r).sum() for g, r in zip(gradients, reference, strict=True)]).sum()
    squared_norm = torch.stack([r.square().sum() for r in reference]).sum()
    # The squares of a tiny reference may underflow to zero.
    if not (inner < 0 and squared_norm > 0):
        return list(gradients), False
    factor = inner / squared_norm
    return [g - factor * r for g, r in zip(gradients, reference, strict=True)], True
