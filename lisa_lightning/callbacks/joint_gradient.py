"""The norm of the joint gradient of both objectives, by which the Lisa paper shows convergence: `JointGradient`."""

from typing import Any, get_args

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import State
from lisa_lightning.data.spacing import evenly_spaced
from lisa_lightning.objective.backprop import norm
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.trainer.module import LisaModule


class JointGradient(Callback):
    """Measures f on alignment rows, h on user rows, and ||grad f + grad h||, before the first step and every few steps.

    The paper shows by this norm that the iterates of Lisa converge (Figures 4 and 5, Theorem 1). Both losses are means
    over the supervised tokens of fixed rows, spread evenly over each stream, without dropout. Every rank measures the
    same.

    Args:
        rows: rows of each stream, > 0.
        every: optimizer steps between two measurements, > 0.
    """

    def __init__(self, rows: int, every: int) -> None:
        self.rows = rows
        self.every = every
        self.packs: dict[State, tuple[list[Pack], int]] = {}
        """State -> the packs of its rows, and the number of their supervised tokens."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the rows, and measure before the first step."""
        assert isinstance(pl_module, LisaModule)
        datamodule: Any = getattr(trainer, "datamodule", None)
        for state in get_args(State):
            self.packs[state] = self._packs(datamodule.steps, state, pl_module.device)
        if trainer.global_step == 0:
            pl_module.log_to_loggers(self._measurement(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Measure if a measurement is due."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step % self.every == 0:
            pl_module.log_curves(self._measurement(pl_module))

    def _packs(self, steps: Any, state: State, device: torch.device) -> tuple[list[Pack], int]:
        examples = steps.streams[state]
        rows = [examples[i] for i in evenly_spaced(len(examples), self.rows)]
        micro_batches = [rows[i : i + steps.batch_size] for i in range(0, len(rows), steps.batch_size)]
        packs = [pack.to(device) for micro_batch in micro_batches for pack in steps.packing(micro_batch)]
        return packs, max(1, sum(row.supervised for row in rows))

    def _measurement(self, module: LisaModule) -> dict[str, float]:
        metrics = {}
        joint = [torch.zeros_like(w) for w in module.weights]
        module.net.eval()
        with torch.enable_grad():
            for state, (packs, tokens) in self.packs.items():
                total = 0.0
                for pack in packs:  # one at a time, as in training: all of them together may not fit into memory
                    loss = completion_loss(module.backprop.model, [pack]) / tokens
                    total += loss.item()
                    for sum_, gradient in zip(joint, module.backprop.differentiate(loss, module.weights), strict=True):
                        sum_.add_(gradient)
                metrics[f"eval/{state}_loss"] = total
        module.net.train()
        return metrics | {"eval/gradient_norm": norm(joint).item()}
