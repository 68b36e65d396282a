"""The LightningModule around a LoRA net: the one training loop, by manual optimization."""

import logging
import math
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from lisa_lightning.config.validate import refuse_other_run
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import trainable
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.optim import Optim

log = logging.getLogger(__name__)


class NotFiniteError(UserError):
    """Error for a loss or a gradient that is infinite or no number."""


class LisaModule(L.LightningModule):
    """One `training_step` is one optimizer step, so `global_step` counts what the paper counts.

    Clipping, the learning rate and the optimizer are here; the gradient is the method's, out of as many passes over
    micro-batches and ranks as it needs.

    Args:
        passes: over a model with a trainable adapter.
        method: the defense.
        seed: determines the dropout masks, together with step and rank.
        key: what the run is made from; a checkpoint of another key is refused.
    """

    def __init__(self, passes: Passes, method: Method, optim: Optim, seed: int, key: dict[str, Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the adapter alone; on_load_checkpoint checks it is all there
        self.net = passes.net
        self.method = method
        self.optim = optim
        self.seed = seed
        self.key = key
        self.passes = passes
        self.weights = passes.weights
        self.told_unlabelled = False
        self.metrics: dict[str, float] = {}
        """What the last step measured, for the callbacks."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One AdamW for both states: its moments carry over the switches."""
        o = self.optim
        return torch.optim.AdamW(
            self.weights, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=True
        )

    def setup(self, stage: str) -> None:
        """Start the method, before a checkpoint can replace what it keeps, but where it will train.

        Lightning moves the weights only after this hook.
        """
        self.to(self.trainer.strategy.root_device)
        self.method.begin(self.passes, self.optim.steps)

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """Optimizer step `batch.index`."""
        started = perf_counter()
        step = batch.index
        if step != self.global_step:
            raise RuntimeError(f"the loader is at step {step}, the trainer at step {self.global_step}")
        self.passes.seed = _mix(self.seed, step, self.global_rank)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        lr = self.optim.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        metrics = self.method.before_step(step, self.weights)
        metrics["train/state"] = float(batch.main.stream == "alignment")
        if unlabelled := sum(b.unlabelled for b in batch.batches.values()):
            metrics["train/rows_without_label"] = float(unlabelled)
            self._say_unlabelled(step, unlabelled)

        descent = self.method.gradient(self.passes, batch)
        self._require_finite(descent.loss, "loss", step)
        for weight, gradient in zip(self.weights, descent.gradient, strict=True):
            weight.grad = gradient
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.optim.clip or math.inf)
        self._require_finite(norm.item(), "gradient norm", step)
        optimizer.step()

        metrics |= {"train/loss": descent.loss, f"{batch.main.stream}/loss": descent.loss, "train/lr": lr}
        metrics |= descent.metrics | self.method.after_step(self.weights)
        metrics["time/step_s"] = perf_counter() - started
        self.metrics = metrics
        self.log("loss", descent.loss, prog_bar=True, logger=False)

    def _say_unlabelled(self, step: int, rows: int) -> None:
        if not self.told_unlabelled and self.global_rank == 0:
            log.warning(
                "Step %d has %d row(s) whose answer is cut off wholly by data.max_length: such rows count for "
                "nothing. They are counted as train/rows_without_label.",
                *(step, rows),
            )
            self.told_unlabelled = True

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            o = self.optim
            raise NotFiniteError(
                f"The {what} of step {step} is {value}; stopped before it reached the weights. "
                f"A smaller {o.key}.lr (now {o.lr}) or {o.key}.clip (now {o.clip}) may help."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Trainable weights, what the method keeps, the key: plain containers, so that `weights_only` loading works."""
        checkpoint["state_dict"] = {n: w.detach() for n, w in trainable(self.net).items()}
        checkpoint["kept"] = self.method.kept
        checkpoint["key"] = self.key

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the adapter and the method's state.

        Raises:
            UserError: if the checkpoint is of a run with another key.
            ValueError: if its tensors have other names or shapes than this run's.
        """
        refuse_other_run(checkpoint["key"], self.key)
        saved = checkpoint.pop("state_dict")
        weights = trainable(self.net)
        _refuse_other_shapes("weights", saved, weights)
        self._refuse_other_state(checkpoint)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])
        checkpoint["state_dict"] = {}
        self.method.kept = {name: [t.to(self.device) for t in kept] for name, kept in checkpoint["kept"].items()}

    def _refuse_other_state(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless moments and the method's state have the shapes of this run's."""
        for name, tensors in self.method.kept.items():
            _refuse_other_shapes(f"state {name}", checkpoint["kept"].get(name, ()), tensors)
        if absent := self.method.kept.keys() - checkpoint["kept"].keys():
            raise ValueError(f"it lacks the state {min(absent)}")
        for index, state in checkpoint["optimizer_states"][0]["state"].items():
            moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            _refuse_other_shapes(f"moments {index}", moments, dict.fromkeys(moments, self.weights[index]))


def _refuse_other_shapes(what: str, saved: Any, expected: Any) -> None:
    """Raise ValueError unless two mappings or lists hold tensors of the same names and shapes."""

    def shapes(tensors: Any) -> dict[Any, Any]:
        named = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
        return {name: tuple(tensor.shape) for name, tensor in named}

    if shapes(saved) != shapes(expected):
        raise ValueError(f"its {what} have other names or shapes than this run's")


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed for this step and rank; neighbours differ in many bits."""
    value = (seed * 1_000_003 + step) * 1_000_003 + rank
    return (value * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
