"""The LightningModule around a model: `LisaModule.training_step` is one optimizer step, optimized manually."""

import logging
import math
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision

from lisa_lightning.config.optim import Optim
from lisa_lightning.config.same_run import refuse_other_run
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method, move_anchor
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import Factors, causal_model, trainable
from lisa_lightning.model.lora import replace_adapter
from lisa_lightning.model.sharding import is_sharded
from lisa_lightning.objective.backprop import Backprop, IterStream, State, StepOutput
from lisa_lightning.objective.loss import choose_packing
from lisa_lightning.objective.loss_scale import LossScale
from lisa_lightning.objective.proximal import squared_distance
from lisa_lightning.runtime.errors import NotFiniteError, UserError

log = logging.getLogger(__name__)


class LisaModule(L.LightningModule):
    """Trains the adapter of a model, or all its weights, under a defense.

    One `training_step` is one optimizer step, so that `global_step` counts the paper's steps. The gradient comes from
    the method, clipping and the learning rate from `optim`. Use it with a `LisaDataModule`. Training ends after
    `optim.steps` steps, whatever `max_epochs` of the Trainer.

    With `precision="16-mixed"` a step whose gradients overflow is skipped: weights, moments and the method's state stay
    unchanged. It counts as a step all the same, so that schedule, learning rate and batches remain those of its index.

    Args:
        model: a model with a trainable adapter (`PeftModel`), or one of transformers with trainable weights.
        method: the defense.
        optim: settings of the optimizer.
        seed: determines order of rows and dropout masks, together with step and rank.
        deltas: returns what alignment changed in each linear layer, for methods that require it.
        key: what determines the result; a checkpoint with another key is rejected.
        optim_key: name of the config section of `optim`, for messages.
    """

    def __init__(
        self,
        model: Any,
        method: Method,
        optim: Optim,
        seed: int = 0,
        deltas: Callable[[], Mapping[str, Delta]] = dict,
        key: Mapping[str, Any] | None = None,
        optim_key: str = "optim",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        # A checkpoint holds the trainable weights only; on_load_checkpoint checks that it is complete.
        self.strict_loading = False
        self.net = model
        self.method = method
        self.optim = optim
        self.seed = seed
        self.deltas = deltas
        self.key = dict(key or {})
        self.optim_key = optim_key
        self.state: State = {}
        """State of the method; `setup` creates it, a checkpoint restores it."""
        self.started = False
        """True once `Method.start` has run in this process."""
        self.warned_unlabelled = False

    def setup(self, stage: str) -> None:
        """Connect the data module, and create the method's state before a checkpoint can restore it.

        The weights are moved to their device, because Lightning does so only after this hook.
        """
        self.to(self.trainer.strategy.root_device)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, LisaDataModule):
            self.optim = self.optim.for_rows(datamodule.row_count, self.trainer.world_size)
            packing = choose_packing(causal_model(self.net), datamodule.max_length)
            o = self.optim
            even = is_sharded(self.net)
            datamodule.connect(self.method, packing, o.total_steps, o.batch_size, o.accumulate, self.seed, even=even)
        self.backprop = self.make_backprop(getattr(datamodule, "iter_stream", _no_stream))
        self.weights = self.backprop.weights
        self.state = self.method.init(self.backprop)
        self.started = False

    def make_backprop(self, iter_stream: IterStream) -> Backprop:
        """Return the object that computes gradients for the method."""
        return Backprop(self.net, iter_stream, self.deltas, _take_over_scaling(self.trainer))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one AdamW for both states, whose moments persist over the switches."""
        o = self.optim
        return torch.optim.AdamW(
            self.weights, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=True
        )

    def on_train_start(self) -> None:
        """Stop at once if all steps were done before a resume."""
        self._stop_after_last_step()

    def training_step(self, batch: Step, batch_idx: int) -> None:
        """Do optimizer step `batch.index`."""
        started = perf_counter()
        step = batch.index
        if step != self.global_step:
            raise RuntimeError(f"the loader is at step {step}, the trainer at step {self.global_step}")
        self.backprop.seed = _mix(self.seed, step, self.global_rank)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        lr = self.optim.lr_at(self.method.lr_step(step))
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not self.started:
            self.state = self.method.start(self.backprop, self.state)
            self.started = True
        self.state, metrics = move_anchor(self.method, step, self.weights, self.state)
        metrics["train/state"] = float(batch.main.stream == "alignment")
        if unlabelled := batch.unlabelled:
            metrics["train/rows_without_label"] = float(unlabelled)
            self._warn_unlabelled(step, unlabelled)

        if (scale := self.backprop.loss_scale) is not None:
            metrics["train/loss_scale"] = scale.value
        for weight in self.weights:
            # The gradients of the last step are as large as the weights. Without new ones, AdamW changes nothing.
            weight.grad = None
        output = self.backprop.skip_on_overflow(lambda: self.method.gradient(self.backprop, batch, self.state))
        if output is None:
            metrics["train/skipped"] = 1.0
        else:
            self._set_gradients(output, step)
            metrics |= {"train/loss": output.loss, f"{batch.main.stream}/loss": output.loss}
        optimizer.step()

        metrics["train/lr"] = lr
        if output is not None:
            metrics |= output.metrics
            self.log("loss", output.loss, prog_bar=True, logger=False)
        metrics["proximal/drift"] = squared_distance(self.weights, self.state["anchor"]).item()
        metrics["time/step_s"] = perf_counter() - started
        self.log_curves(metrics)
        self._stop_after_last_step()

    def _set_gradients(self, output: StepOutput, step: int) -> None:
        """Set the clipped gradients and the method's new state. Raises NotFiniteError if a value is not finite."""
        self.state |= output.state
        self._require_finite(output.loss, "loss", step)
        for weight, gradient in zip(self.weights, output.gradients, strict=True):
            weight.grad = gradient
        max_norm = None if output.clipped else self.optim.clip
        norm = torch.nn.utils.clip_grad_norm_(self.weights, max_norm or math.inf)
        self._require_finite(norm.item(), "gradient norm", step)

    def finish(self) -> Any:
        """Return the model with the weights that the method saves. The module must not be trained afterwards."""
        return replace_adapter(self.net, self.finished_factors())

    def finished_factors(self) -> Factors:
        """Return the trainable weights that the method saves, on the device of the model."""
        factors = {name: weight.detach() for name, weight in trainable(self.net).items()}
        # After the last step Lightning moves the model to the CPU, and leaves the state on the device.
        device = next(iter(factors.values())).device
        return self.method.finish(factors, _moved(self.state, device))

    def log_curves(self, metrics: Mapping[str, float]) -> None:
        """Log metrics of the last step: through `log_dict` for callbacks, and to every logger."""
        self.log_dict(dict(metrics), logger=False)
        self.log_to_loggers(metrics)

    def log_to_loggers(self, metrics: Mapping[str, float]) -> None:
        """Log metrics to every logger, at the number of finished optimizer steps.

        Loggers are called directly. Through `log_dict` Lightning would log every 50th step only, as float32, and repeat
        the last value of a metric in steps that do not measure it.
        """
        for logger in self.loggers:
            logger.log_metrics(dict(metrics), self.global_step)

    def _stop_after_last_step(self) -> None:
        if self.global_step >= self.optim.total_steps:
            self.trainer.should_stop = True

    def _warn_unlabelled(self, step: int, rows: int) -> None:
        if not self.warned_unlabelled and self.global_rank == 0:
            log.warning(
                "Step %d has %d row(s) whose answer data.max_length cuts off wholly: such rows count for nothing. They "
                "are counted as train/rows_without_label.",
                *(step, rows),
            )
            self.warned_unlabelled = True

    def _require_finite(self, value: float, name: str, step: int) -> None:
        if not math.isfinite(value):
            key, o = self.optim_key, self.optim
            raise NotFiniteError(
                f"The {name} of step {step} is {value}; stopped before it reached the weights. "
                f"A smaller {key}.lr (now {o.lr}) or {key}.clip (now {o.clip}) may help."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store trainable weights, the method's state and the key, as plain containers that load without unpickling."""
        checkpoint["state_dict"] = {n: w.detach() for n, w in trainable(self.net).items()}
        checkpoint["method_state"] = self.state
        checkpoint["key"] = self.key
        if self.backprop.loss_scale is not None:
            checkpoint["loss_scale"] = self.backprop.loss_scale.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the trainable weights and the method's state.

        Raises:
            UserError: if the checkpoint is of a run with another key.
            ValueError: if its tensors have other names or shapes than those of this run.
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
        if self.backprop.loss_scale is not None:
            self.backprop.loss_scale.load_state_dict(checkpoint["loss_scale"])
        self.state = _moved(checkpoint["method_state"], self.device)

    def _refuse_other_state(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError unless moments and method state have the shapes of this run."""
        saved = checkpoint["method_state"]
        for name, tensors in self.state.items():
            _refuse_other_shapes(f"state {name}", saved.get(name, ()), tensors)
        if absent := self.state.keys() - saved.keys():
            raise ValueError(f"it lacks the state {min(absent)}")
        for index, state in checkpoint["optimizer_states"][0]["state"].items():
            moments = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
            _refuse_other_shapes(f"moments {index}", moments, dict.fromkeys(moments, self.weights[index]))


def _moved(state: State, device: torch.device) -> State:
    return {name: [tensor.to(device) for tensor in tensors] for name, tensors in state.items()}


def _take_over_scaling(trainer: L.Trainer) -> LossScale | None:
    """Return the loss scale of `precision="16-mixed"` in place of Lightning's scaler; None for other precisions.

    Lightning's scaler expects one backward pass a step through `manual_backward`.
    """
    plugin = trainer.precision_plugin
    if not isinstance(plugin, MixedPrecision) or plugin.precision != "16-mixed":
        return None
    plugin.scaler = None
    return LossScale()


def _no_stream(stream: str, batch_size: int, padded: bool, rows: int | None) -> Any:
    raise UserError("The method reads whole streams of rows. Fix: fit with a LisaDataModule")


def _refuse_other_shapes(name: str, saved: Any, expected: Any) -> None:
    """Raise ValueError unless two mappings or lists hold tensors of the same names and shapes."""

    def shapes(tensors: Any) -> dict[Any, Any]:
        named = tensors.items() if isinstance(tensors, dict) else enumerate(tensors)
        return {key: tuple(tensor.shape) for key, tensor in named}

    if shapes(saved) != shapes(expected):
        raise ValueError(f"its {name} have other names or shapes than those of this run")


def _mix(seed: int, step: int, rank: int) -> int:
    """Return a seed for this step and rank; neighbouring seeds differ in many bits."""
    value = (seed * 1_000_003 + step) * 1_000_003 + rank
    return (value * 0x9E3779B97F4A7C15 + 0x7F4A7C15) % 2**63
