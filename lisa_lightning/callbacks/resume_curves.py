"""Consistency of curves and checkpoints: `ResumeCurves` continues the curves where a checkpoint was saved."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.runtime.ranks import on_rank_zero


class ResumeCurves(Callback):
    """Starts the curves of a stage, or continues them after a resume.

    A checkpoint stores a hash of the rows that the curves have, which are then on the disk.

    Args:
        loggers: of the run; None on ranks other than the first and in stages without curves.
        stage: finetune or align.
    """

    def __init__(self, loggers: RunLoggers | None, stage: str) -> None:
        self.loggers = loggers
        self.stage = stage
        self.digest = ""

    def state_dict(self) -> dict[str, Any]:
        """Return a hash of the rows of the stage."""
        if self.loggers is None:
            return {"rows": ""}
        self.loggers.curves.flush()
        return {"rows": self.loggers.curves.digest(self.stage)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the hash that the checkpoint was saved with."""
        self.digest = state_dict["rows"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Drop rows after the checkpoint's step. Raises UserError on every rank if rows before it are lost."""

        def start() -> None:
            if self.loggers is not None:
                self.loggers.start(self.stage, trainer.global_step, self.digest)

        on_rank_zero(trainer.strategy, start)
