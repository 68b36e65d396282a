"""The progress bar of a stage: `StageBar`."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StageBar(TQDMProgressBar):
    """Lightning's progress bar, labelled with the stage instead of the epoch."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Label the bar."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the line of the bar, so that a message starts on a new one."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()
