"""Early stopping on a curve of fine-tuning: `CurveEarlyStopping`."""

from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping


class CurveEarlyStopping(EarlyStopping):
    """Stops fine-tuning when a curve no longer improves.

    Lightning's EarlyStopping checks after a validation epoch, which step-based fine-tuning does not have. This one
    checks every `every` steps.

    Args:
        monitor: name of the metric in curves.csv, such as eval/accuracy.
        every: optimizer steps between two checks, > 0; for eval/ metrics that of `evaluate.every`.
        mode: max if higher values are better, else min.
        patience: number of checks without improvement after which training stops, > 0.
        min_delta: smallest change that counts as an improvement, >= 0.
    """

    def __init__(
        self, monitor: str, every: int, mode: Literal["min", "max"], patience: int, min_delta: float = 0.0
    ) -> None:
        super().__init__(monitor, min_delta, patience, mode=mode, check_on_train_epoch_end=False)
        self.every = every

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Stop if a check is due and fails."""
        if trainer.global_step % self.every == 0:
            super().on_validation_end(trainer, pl_module)
