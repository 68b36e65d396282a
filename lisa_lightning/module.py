"""The LightningModule around a LoRA net: the one training loop, by manual optimization."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from peft import PeftModel

from lisa_lightning.config import flat
from lisa_lightning.data.interleave import Step
from lisa_lightning.errors import UserError
from lisa_lightning.loss import completion_loss
from lisa_lightning.methods.method import Method
from lisa_lightning.net import trainable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Optim:
    """AdamW and its schedule (conf/config.yaml, `optim`)."""

    lr: float
    steps: int
    batch_size: int
    accumulate: int
    clip: float | None
    schedule: str
    warmup_ratio: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float

    def lr_at(self, step: int) -> float:
        """The learning rate of a 0-based step; `constant` has no warm-up, as in the official runs."""
        if self.schedule == "constant":
            return self.lr
        warmup = math.ceil(self.warmup_ratio * self.steps)
        if step < warmup:
            return self.lr * step / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done)


class LisaModule(L.LightningModule):
    """One `training_step` is one optimizer step, so `global_step` counts what the paper counts.

    Accumulation, clipping and the learning rate are done here; the method adds its penalty between backward and
    clipping. The loss is the mean over all supervised tokens of the step, across micro-batches and ranks.

    Args:
        net: a model with a trainable adapter.
        method: the defense.
        seed: determines the dropout masks, together with step and rank.
        key: what the run is made from; a checkpoint of another key is refused.
    """

    def __init__(self, net: PeftModel, method: Method, optim: Optim, seed: int, key: dict[str, Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the adapter alone; on_load_checkpoint checks it is all there
        self.net = net
        self.method = method
        self.optim = optim
        self.seed = seed
        self.key = key
        self.weights = list(trainable(net).values())
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
        """Start the method's anchor, before a checkpoint can replace it."""
        self.method.begin(self.weights, self.optim.steps)

    def on_fit_start(self) -> None:
        """The weights have moved to their device by now; the anchor follows."""
        self.method.anchor = [a.to(w.device) for a, w in zip(self.method.anchor, self.weights, strict=True)]

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """Optimizer step `batch.index`."""
        started = perf_counter()
        step = batch.index
        if step != self.global_step:
            raise RuntimeError(f"the loader is at step {step}, the trainer at step {self.global_step}")
        torch.manual_seed(_mix(self.seed, step, self.global_rank))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        lr = self.optim.lr_at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        metrics = self.method.before_step(step, self.weights)
        metrics["train/state"] = float(batch.state == "alignment")
        if batch.unlabelled:
            metrics["train/rows_without_label"] = float(batch.unlabelled)
            self._say_unlabelled(step, batch)

        optimizer.zero_grad()
        loss = self._descend(batch)
        self._require_finite(loss, "loss", step)
        penalty = self.method.penalize(step, self.weights)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.optim.clip or math.inf)
        self._require_finite(norm.item(), "gradient norm", step)
        optimizer.step()

        metrics |= {"train/loss": loss, f"{batch.state}/loss": loss, "train/lr": lr, "proximal/penalty": penalty}
        metrics["proximal/drift"] = self.method.drift(self.weights)
        metrics["time/step_s"] = perf_counter() - started
        self.metrics = metrics
        self.log("loss", loss, prog_bar=True, logger=False)

    def _say_unlabelled(self, step: int, batch: Step) -> None:
        if not self.told_unlabelled and self.global_rank == 0:
            log.warning(
                "Step %d has %d %s row(s) whose answer is cut off wholly by data.max_length: such rows count for "
                "nothing. They are counted as train/rows_without_label.",
                *(step, batch.unlabelled, batch.state),
            )
            self.told_unlabelled = True

    def _descend(self, batch: Step) -> float:
        """Leave the gradient of the step's mean token loss in the weights; return that loss."""
        # Ranks average their gradients, so each scales its share of the sum by their number.
        scale = self.trainer.world_size / max(1, batch.tokens)
        total = torch.zeros((), device=self.device)
        for packs in batch.micro_batches:
            if packs:
                loss = completion_loss(self.net.get_base_model(), packs) * scale
            else:  # nothing to learn, but ranks must stay in step
                loss = torch.stack([w.sum() for w in self.weights]).sum() * 0.0
            self.manual_backward(loss)
            total += loss.detach()
        return self.trainer.strategy.reduce(total, reduce_op="mean").item()

    def _require_finite(self, value: float, what: str, step: int) -> None:
        if not math.isfinite(value):
            raise UserError(
                f"The {what} of step {step} is {value}; stopped before it reached the weights. The last good "
                f"checkpoint is kept. A smaller optim.lr (now {self.optim.lr}) or optim.clip (now {self.optim.clip}) "
                "may help."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Trainable weights, anchor and key only; all plain containers, so that `weights_only` loading works."""
        checkpoint["state_dict"] = {n: w.detach() for n, w in trainable(self.net).items()}
        checkpoint["anchor"] = self.method.anchor
        checkpoint["key"] = self.key

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the adapter and the anchor back.

        Raises:
            UserError: the checkpoint is of a run with another key.
        """
        refuse_other_run(checkpoint.get("key", {}), self.key)
        saved = checkpoint.pop("state_dict")
        own = trainable(self.net)
        if saved.keys() != own.keys():
            raise UserError(f"The checkpoint is of another model: it lacks {sorted(own.keys() - saved.keys())[:3]}")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(saved[name])
        checkpoint["state_dict"] = {}
        self.method.anchor = list(checkpoint["anchor"])


def refuse_other_run(saved: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> None:
    """Raise UserError naming the first few settings in which a checkpoint's run differs from this one."""
    old, new = dict(flat(saved)), dict(flat(wanted))
    other = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if other:
        shown = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in other[:3])
        raise UserError(f"The checkpoint is of another run ({shown}). Start anew in another hydra.run.dir.")


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed for this step and rank; neighbours differ in many bits."""
    value = (seed * 1_000_003 + step) * 1_000_003 + rank
    return (value * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
