"""Checkpoints of a stage: `Checkpoint` saves every few steps and after the last one."""

import logging
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.memory import peak_memory_mib, reset_peak_memory

log = logging.getLogger(__name__)


class Checkpoint(Callback):
    """Saves a checkpoint every few steps and when training stops, and accumulates the cost of a stage over resumes.

    It must be the last callback, so that what the others log at a step is on the disk before the checkpoint.

    Args:
        path: of the file.
        every: optimizer steps between two checkpoints, > 0.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        self.earlier = {"seconds": 0.0, "peak_mib": 0.0}
        """Cost before the last resume."""
        self.started = 0.0
        self.device = torch.device("cpu")
        self.restored = False

    @property
    def cost(self) -> dict[str, float]:
        """Seconds spent on this stage and its peak memory in MiB, interrupted runs included."""
        if not self.started:
            return self.earlier
        seconds = self.earlier["seconds"] + perf_counter() - self.started
        return {"seconds": seconds, "peak_mib": max(self.earlier["peak_mib"], peak_memory_mib(self.device))}

    def state_dict(self) -> dict[str, Any]:
        """Return the cost so far."""
        return self.cost

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the cost before the resume."""
        self.earlier = {name: state_dict[name] for name in self.earlier}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out the time that a Timer has counted: `max_time` limits every try, not their sum."""
        checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if not k.startswith("Timer")}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock. Raises ValueError if a checkpoint's data and loop are at different steps."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule.position != trainer.global_step:
            raise ValueError(f"its data are at step {datamodule.position}, its loop at {trainer.global_step}")
        self.restored = True
        if trainer.global_step and trainer.is_global_zero:
            log.info("%s continues after step %d of %d.", self.path.stem, trainer.global_step, len(datamodule.steps))
        self.started = perf_counter()
        self.device = pl_module.device
        reset_peak_memory(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Save if a checkpoint is due or training stops; all ranks take part."""
        if trainer.global_step % self.every and not trainer.should_stop:
            return
        error_text = None
        try:
            trainer.save_checkpoint(self.path)
        except UserError as error:  # on the first rank, which alone writes
            error_text = str(error)
            trainer.strategy.barrier()  # where the others wait
        if (error_text := trainer.strategy.broadcast(error_text)) is not None:
            raise UserError(error_text)
