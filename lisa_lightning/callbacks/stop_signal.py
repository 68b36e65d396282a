"""Signals during training: `StopSignal` stops all ranks after the same step, with a checkpoint."""

import signal
import threading
from signal import Signals
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lisa_lightning.runtime.stop import STOP_SIGNALS, Stopped


class StopSignal(Callback):
    """Stops training after the step in which any rank receives a signal of `STOP_SIGNALS`.

    It must precede `Checkpoint`, which saves when training stops. Lightning's own handlers call a collective inside a
    signal, which can meet a collective of the step.
    """

    def __init__(self) -> None:
        self._received: Signals | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace the handlers that Lightning has set by now. It restores the earlier ones at its end."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._record)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Stop all ranks if one of them has received a signal."""
        number = torch.tensor(self._received or 0, device=pl_module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        if number.item():
            self._received = Signals(int(number))
            trainer.should_stop = True

    def raise_received(self) -> None:
        """Raise Stopped if a signal has arrived."""
        if self._received is not None:
            raise Stopped(self._received)

    def _record(self, number: int, _: Any) -> None:
        self._received = Signals(number)
