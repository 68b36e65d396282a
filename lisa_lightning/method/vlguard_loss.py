"""VLGuard as a loss: every step also descends the loss on a few alignment rows."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Count, NonNegative
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput


@final
@dataclass(frozen=True, config=STRICT)
class VLGuardLoss(Method):
    """Descend loss(user rows) + lamb * loss(alignment rows) (Booster's repository, after Zong et al., ICML 2024).

    One forward and one backward pass over the rows of both streams. The paper mixes rows, as `vlguard` does. This is
    the official code of Booster's baseline, which uses the first 1999 alignment rows (conf/experiment/paper).
    """

    lamb: NonNegative = 1.0
    """Factor of the loss on alignment rows; 0 is SFT. The official scripts try several, the first is 0.1."""
    safe_rows: Count = 4
    """Alignment rows a step. The official code has 4."""

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of user rows and `safe_rows` alignment rows."""
        return {"user": StreamBatch(step), "alignment": StreamBatch(step, self.safe_rows)}

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the sum of both losses."""
        user_loss, user_gradients = backprop.gradient(step.main)
        safe_loss, safe_gradients = backprop.gradient(step.batches["alignment"])
        gradients = [user + self.lamb * safe for user, safe in zip(user_gradients, safe_gradients, strict=True)]
        metrics = {"alignment/loss": safe_loss, "vlguard_loss/penalty": self.lamb * safe_loss}
        return StepOutput(user_loss, gradients, metrics)
