"""DPO: make the refusal of a request more likely than the harmful answer to it."""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.align.base import Aligner
from lisa_lightning.config.fields import STRICT, Positive
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.loss import row_losses


@final
@dataclass(frozen=True, config=STRICT)
class DPO(Aligner):
    """Train by direct preference optimization (Rafailov et al., NeurIPS 2023, Eq. 7), for NLSR's reference adapter.

    Row i of the stream `alignment` is the preferred answer to a request, row i of `defender` the other one. The
    reference policy is the model at the start. Two forward passes over both streams and one backward.
    """

    beta: Positive = 0.1
    """Strength of the tie to the reference policy. NLSR has 0.1."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider."""
        return frozenset({"defender_rows"})

    @property
    def paired(self) -> bool:
        """True: both streams have answers to the same requests."""
        return True

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of refusals and one of harmful answers."""
        return {"alignment": StreamBatch(step), "defender": StreamBatch(step)}

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of -log sigmoid(beta * (gain of the preferred - gain of the other)), mean over pairs."""
        rejected = step.batches["defender"].nonempty
        first_labels = [(p.label_index == 0).sum() for packs in step.main.micro_batches for p in packs]
        count = torch.tensor([float(sum(first_labels))], device=backprop.device)
        pairs = backprop.all_reduce_sum([count])[0].item()

        def preference_loss(packs: Sequence[Pack], index: int) -> Tensor:
            sides = packs, rejected[index]
            with backprop.reference_pass(state["anchor"]):
                reference = [row_losses(backprop.model, side)[0] for side in sides]
            gains = (start - row_losses(backprop.model, side)[0] for side, start in zip(sides, reference, strict=True))
            preferred, other = gains
            return -F.logsigmoid(self.beta * (preferred - other)).sum() / pairs

        return StepOutput(*backprop.gradient(step.main, preference_loss))
