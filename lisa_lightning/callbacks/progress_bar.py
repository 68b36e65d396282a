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

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the values to show, without the loggers' version, which repeats the label."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the line of the bar, so that a message starts on a new one."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()
