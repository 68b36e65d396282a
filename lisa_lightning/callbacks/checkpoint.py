"""Checkpoints every few steps and after the last."""

import logging
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.memory import peak_mib, watch

log = logging.getLogger(__name__)


class Checkpoint(Callback):
    """Saves every few steps and after the last, and carries what the stage cost over a resume."""

    def __init__(self, path: Path, every: int, last: int) -> None:
        self.path = path
        self.every = every
        self.last = last
        self.before = {"seconds": 0.0, "peak_mib": 0.0}
        self.started = 0.0
        self.device = torch.device("cpu")
        self.restored = False

    @property
    def cost(self) -> dict[str, float]:
        """Seconds spent on this stage so far and its peak memory in MiB, interrupted runs included."""
        if not self.started:
            return self.before
        seconds = self.before["seconds"] + perf_counter() - self.started
        return {"seconds": seconds, "peak_mib": max(self.before["peak_mib"], peak_mib(self.device))}

    def state_dict(self) -> dict[str, Any]:
        """The cost."""
        return self.cost

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.before = {name: state_dict[name] for name in self.before}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock starts."""
        data: Any = trainer
        if data.datamodule.position != trainer.global_step:
            raise ValueError(f"its data are at step {data.datamodule.position}, its loop at {trainer.global_step}")
        self.restored = True
        if trainer.global_step and trainer.is_global_zero:
            log.info("%s goes on after step %d of %d.", self.path.stem, trainer.global_step, self.last)
        self.started = perf_counter()
        self.device = pl_module.device
        watch(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Save where it is due; all ranks take part."""
        if trainer.global_step % self.every and trainer.global_step != self.last:
            return
        trouble = None
        try:
            trainer.save_checkpoint(self.path)
        except UserError as error:  # of the first rank, which alone writes
            trouble = str(error)
            trainer.strategy.barrier()  # at which the others wait
        if (trouble := trainer.strategy.broadcast(trouble)) is not None:
            raise UserError(trouble)
