"""SPAG: user steps, each followed by a step on alignment rows while their loss is too high."""

from collections.abc import Sequence
from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, CountOrZero, NonNegative, Positive
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.dpp import DPP
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule, Stream, StreamBatch
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput, clip


@final
@dataclass(frozen=True, config=STRICT)
class SPAG(Method):
    """Alternate a user step and a safe step, which acts only while a loss exceeds a threshold (SPARD, ICML 2026).

    A round is two optimizer steps with one learning rate and one AdamW:

        1. the gradient of the loss on user rows
        2. the gradient g of the loss L on `safe_rows` alignment rows at the new weights

    The second step is taken if

        L > tau + delta

    Each tensor p of its gradient is multiplied, after clipping, by

        min((L - tau) / (||g_p|| + 1e-8), alpha_max)

    Otherwise the second step changes nothing: neither weights nor moments nor step counts.

    One forward and one backward pass a step. Before the training, one forward pass over the prompts of user and
    alignment rows selects the alignment rows to use. It needs memory for one hidden state of every row, see
    `lisa_lightning/data/dpp.py`. `optim.epochs` and `optim.warmup_ratio` count both steps of a round.

    The paper's abstract names a closed-form projection. The official code, which is followed here, differs from it:
        - The norm is of each tensor, not of the whole gradient, and divides it once. A projection divides twice.
        - AdamW receives the scaled gradient. So alpha_max weighs it against user gradients, and bounds no step.

    Departures from the official code:
        - All micro-batches of a step count. With accumulation, the official loop gets out of step.
        - L is the mean over all label tokens of the safe rows. The official L is the mean of each micro-batch's mean.
        - Safe rows are drawn from all alignment rows. The official ones are harmful requests with refusals.
        - An epoch of user rows does not restart the order of the alignment rows.
        - Rows are selected by embeddings of the model that is fine-tuned. The official code names no model.
        - A prompt's embedding leaves out tokens after data.max_length.
        - At least one row is selected.
    """

    tau: NonNegative = 0.2
    """Loss on alignment rows that the safe step aims at. The official script has 0.2."""
    delta: NonNegative = 0.1
    """Excess over `tau` up to which the safe step is left out. The official script has 0.1."""
    alpha_max: Positive = 1.0
    """Largest factor of a tensor's gradient in the safe step. The official script has 1, its readme optim.lr."""
    safe_rows: Count = 1
    """Alignment rows of a safe step. The official script has 1 in each of 4 micro-batches."""
    safe_ratio: Positive | None = 0.03
    """Alignment rows to select, relative to the user's rows; None uses all of them. The official script has 0.03."""
    power: CountOrZero = 4
    """Exponent of relevance in the selection; 0 selects by diversity alone. The official script has 4."""
    clip: Positive | None = 1.0
    """Largest gradient norm of the safe step before scaling; None for no clipping. The official code has 1, as for the
    user step."""

    @property
    def schedule(self) -> Schedule:
        """A user step, then a safe step."""
        return Schedule(alignment_steps=1, user_steps=1, user_first=True)

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Passes of the whole model, for the selection."""
        return frozenset({"whole_model"} if self.selection is not None else ())

    @property
    def selection(self) -> DPP | None:
        """The selection by `safe_ratio` and `power`."""
        return None if self.safe_ratio is None else DPP(self.safe_ratio, self.power)

    def lr_step(self, step: int) -> int:
        """Return the first step of the round, since the official code changes the learning rate once a round."""
        return step - step % 2

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of user rows, or `safe_rows` alignment rows."""
        state = self.schedule.state(step)
        size = self.safe_rows if state == "alignment" else None
        return {state: StreamBatch(self.schedule.steps_in(state, step), size)}

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the step: scaled for a safe step, None for all weights if there is no safe step."""
        loss, gradients = backprop.gradient(step.main)
        if step.main.stream == "user":
            return StepOutput(loss, gradients)
        triggered = loss > self.tau + self.delta
        metrics = {"spag/safe_loss": loss, "spag/triggered": float(triggered)}
        if not triggered:
            return StepOutput(loss, [None] * len(gradients), metrics)
        if self.clip is not None:
            gradients, _ = clip(gradients, self.clip)
        scaled = [g * scale for g, scale in zip(gradients, self.scales(loss, gradients), strict=True)]
        return StepOutput(loss, scaled, metrics, clipped=True)

    def scales(self, loss: float, gradients: Sequence[Tensor]) -> Tensor:
        """Return the factor of each clipped gradient of a safe step with this loss."""
        norms = torch.stack([gradient.norm() for gradient in gradients])
        return ((loss - self.tau) / (norms + 1e-8)).clamp(max=self.alpha_max)
