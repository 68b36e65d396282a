"""The progress bar of a stage."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StageBar(TQDMProgressBar):
    """Lightning's bar, named after the stage: the run is one epoch, so its number says nothing."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Rate and time left of the whole stage."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the bar's line, so that a message starts on one of its own."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()
