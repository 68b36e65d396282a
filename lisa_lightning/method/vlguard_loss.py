"""Safe rows beside the user's: every step also descends the loss on a few alignment rows."""

from typing import final

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Draw, Schedule, Stream
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Descent, Passes


@final
class VLGuardLoss(Method):
    """Loss on the user's rows + lamb * loss on alignment rows (Booster's repository, after Zong et al., ICML 2024).

    One forward and one backward pass over the rows of both streams. The paper mixes rows, as `vlguard` does; this is
    the official code of Booster's baseline, which takes the first 1999 alignment rows (conf/experiment/paper).

    Args:
        lamb: factor, >= 0; 0 is SFT.
        safe_rows: alignment rows a step; 4 in the official code.
    """

    def __init__(self, lamb: float, safe_rows: int) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.lamb = lamb
        self.safe_rows = safe_rows

    def draws(self, step: int) -> dict[Stream, Draw]:
        """Both streams."""
        return {"user": Draw(step), "alignment": Draw(step, self.safe_rows)}

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of both losses."""
        loss, gradient = passes.gradient(step.main)
        safe, more = passes.gradient(step.batches["alignment"])
        combined = [u + self.lamb * s for u, s in zip(gradient, more, strict=True)]
        return Descent(loss, combined, {"alignment/loss": safe, "vlguard_loss/penalty": self.lamb * safe})
