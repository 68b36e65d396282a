"""The joint gradient norm of both objectives, by which the Lisa paper shows convergence."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lisa_lightning.data.interleave import StepBatches
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.objective.backprop import norm
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.trainer.module import LisaModule


class JointGradient(Callback):
    """Losses f on alignment rows and h on user rows, and ||grad f + grad h||, at the points of the curves.

    The norm by which the Lisa paper shows that its iterates come to rest (Figures 4 and 5, Theorem 1). Both are means
    over the tokens of fixed rows, spread over each stream, without dropout; every rank measures the same.
    """

    def __init__(self, rows: int, every: int) -> None:
        self.rows = rows
        self.every = every
        self.packs: dict[Stream, tuple[list[Pack], int]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the rows; the point before the first step."""
        data: Any = trainer
        steps: StepBatches = data.datamodule.steps
        both: tuple[Stream, ...] = ("alignment", "user")
        for state in both:
            examples = steps.streams[state]
            stride = max(1, len(examples) // self.rows)
            chosen = [examples[i] for i in range(0, len(examples), stride)][: self.rows]
            parts = [chosen[i : i + steps.batch_size] for i in range(0, len(chosen), steps.batch_size)]
            packs = [p.to(pl_module.device) for part in parts for p in steps.packing(part)]
            self.packs[state] = packs, max(1, sum(e.supervised for e in chosen))
        if trainer.global_step == 0:
            self._measure(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """A point of the curves."""
        if trainer.global_step % self.every == 0:
            self._measure(pl_module)

    def _measure(self, module: L.LightningModule) -> None:
        assert isinstance(module, LisaModule)
        joint = [torch.zeros_like(w) for w in module.weights]
        module.net.eval()
        with torch.enable_grad():
            for state, (packs, tokens) in self.packs.items():
                total = 0.0
                for pack in packs:  # one at a time, as training does: all of them together may not fit
                    loss = completion_loss(module.net.get_base_model(), [pack]) / tokens
                    total += loss.item()
                    for total_gradient, own in zip(joint, torch.autograd.grad(loss, module.weights), strict=True):
                        total_gradient.add_(own)
                module.metrics[f"eval/{state}_loss"] = total
        module.net.train()
        module.metrics["eval/gradient_norm"] = norm(joint).item()
