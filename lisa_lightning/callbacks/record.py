"""The metrics of each step, passed on to the tracker."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lisa_lightning.logger.wandb import Tracker
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.ranks import by_first
from lisa_lightning.trainer.module import LisaModule

SAYS_NOTHING = {"align": ("train/state", "alignment/loss", "proximal/drift")}
"""Of a stage with one state, and no anchor but its start."""


class Record(Callback):
    """Hands each step's metrics to the tracker, once."""

    def __init__(self, tracker: Tracker | None, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage
        self.rows_at_checkpoint = ""

    def state_dict(self) -> dict[str, Any]:
        """Return a hash of the stage's rows, which are on disk then: no checkpoint outlives its curves."""
        if self.tracker is None:
            return {"rows": ""}
        self.tracker.curves.flush()
        return {"rows": self.tracker.curves.digest(self.stage)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the rows that the checkpoint was written with."""
        self.rows_at_checkpoint = state_dict["rows"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The point before the first step, or the place where the curves go on."""

        def start() -> None:
            if self.tracker is None:
                return
            self.tracker.start(self.stage, trainer.global_step or -1)
            if trainer.global_step and self.tracker.curves.digest(self.stage) != self.rows_at_checkpoint:
                raise UserError(
                    f"{self.tracker.curves.path} lacks rows of stage {self.stage}, or has others, than when step "
                    f"{trainer.global_step} was saved. Fix: delete checkpoints/{self.stage}.ckpt next to it; the stage "
                    "then starts again"
                )

        by_first(trainer.strategy, start)
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """After every optimizer step."""
        assert isinstance(pl_module, LisaModule)
        left_out = SAYS_NOTHING.get(self.stage, ())
        metrics = {name: value for name, value in pl_module.metrics.items() if name not in left_out}

        def record() -> None:
            if self.tracker is not None and metrics:
                self.tracker.log(self.stage, trainer.global_step, metrics)

        by_first(trainer.strategy, record)
        pl_module.metrics = {}
