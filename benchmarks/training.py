"""Benchmarks of the training step: `rate` (share of the machine's peak), `lisa_against_sft` and `fit_against_bare`."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setting import LORA, REPETITIONS, RHO, Result, Rows, spread
from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.resume_curves import ResumeCurves
from lisa_lightning.config.optim import Optim
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Example, Pack, pack
from lisa_lightning.logger.curves_logger import CurvesLogger
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.logger.wandb import WandbLogger
from lisa_lightning.method.base import Method, move_anchor
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.frozen_linear import onednn_linear
from lisa_lightning.model.lora import attach, load
from lisa_lightning.objective.backprop import Backprop, LossFn, StepOutput
from lisa_lightning.objective.proximal import squared_distance
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.trainer.module import LisaModule

FIT_STEPS = 9
TRAINER = {"accelerator": "cpu", "devices": 1}


def lisa() -> Lisa:
    """Return Lisa on user rows only, with the penalty from the second step on."""
    return Lisa(alignment_steps=0, user_steps=1, rho=RHO, proximal_after=0.0)


class _TimedPasses(Backprop):
    """Backprop that measures the seconds of forward passes."""

    forward = 0.0

    def mean_loss(self, batch: Batch) -> LossFn:
        """Return the mean loss, timed."""
        mean_loss = super().mean_loss(batch)

        def timed(packs: Sequence[Pack], index: int) -> Tensor:
            started = perf_counter()
            loss = mean_loss(packs, index)
            self.forward += perf_counter() - started
            return loss

        return timed


class Ours:
    """The training step of `LisaModule`, without Lightning around it."""

    def __init__(self, net: Any, method: Method) -> None:
        self.net = net
        self.backprop = _TimedPasses(net, iter_stream=lambda *_: iter(()))
        self.weights = self.backprop.weights
        randomize(self.weights)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.0, foreach=True)
        self.use(method)

    def use(self, method: Method) -> None:
        """Train with this method from now on."""
        self.method = method
        self.state = method.init(self.backprop)

    def step(self, rows: Sequence[Example]) -> float:
        """Make one step, including the packing of its rows, and return its loss."""
        started = perf_counter()
        user_batch = Batch("user", [pack(rows)], sum(r.supervised for r in rows)).to(self.backprop.device)
        self.seconds = {"data": perf_counter() - started}
        self._timed("penalty", lambda: move_anchor(self.method, 1, self.weights, self.state))
        self.backprop.forward = 0.0
        step = Step(1, 2, {"user": user_batch})
        output = self._timed("backward", lambda: self.method.gradient(self.backprop, step, self.state))
        self.seconds["forward"] = self.backprop.forward
        self.seconds["backward"] -= self.backprop.forward
        self._timed("optimizer", lambda: self._update(output))
        self._timed("penalty", lambda: squared_distance(self.weights, self.state["anchor"]))
        return output.loss

    def _update(self, output: StepOutput) -> None:
        for weight, gradient in zip(self.weights, output.gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()

    def _timed(self, part: str, call: Any) -> Any:
        """Return the result of `call`, and add its seconds to a part of the step."""
        started = perf_counter()
        result = call()
        self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - started
        return result


def adapted(folder: Path) -> Any:
    """Return the model in a folder with the benchmarks' adapter."""
    return attach(load(folder, "float32"), LORA, seed=0)


def randomize(weights: Sequence[Tensor]) -> None:
    """Replace the weights of a fresh adapter, half of which are zero, by random ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in weights:
            w.copy_(torch.randn(w.shape, generator=generator) * 0.02)


def batch(rows: Sequence[Example], size: int, i: int) -> Sequence[Example]:
    """Return batch `i` of the rows."""
    return rows[i * size : (i + 1) * size]


def lisa_against_sft(ours: Ours, rows: Rows, repetitions: int = 15) -> Result:
    """Measure the cost of the penalty.

    Every batch is trained with both methods, in changing order. Drift is measured in both. A switch, once per cycle,
    costs one more copy of the adapter.
    """
    methods = {"lisa": lisa(), "sft": SFT()}
    costs = []
    for i in range(repetitions + 1):
        seconds = {}
        for name in ("lisa", "sft") if i % 2 else ("sft", "lisa"):
            ours.use(methods[name])
            started = perf_counter()
            ours.step(batch(rows.sst2, 5, i))
            seconds[name] = perf_counter() - started
        costs.append(100 * (seconds["lisa"] / seconds["sft"] - 1))
    cost = median(costs[1:])
    return Result("Lisa's step, dearer than SFT's", cost, 1.0, "lower", "%", spread(costs[1:], 1))


def fit_against_bare(ours: Ours, folder: Path, rows: Rows) -> tuple[Result, dict[str, float]]:
    """Measure the overhead of Lightning, curves and W&B around the same steps.

    Returns:
        The overhead, and the seconds of a step by part.
    """
    overhead, profiles, logging = [], [], []
    for _ in range(REPETITIONS):
        bare, part_seconds = _bare_seconds(ours, rows)
        inside, log_seconds = _fit_seconds(folder, rows)
        overhead.append(100 * (inside / bare - 1))
        profiles.append(part_seconds | {"the rest": bare - sum(part_seconds.values())})
        logging.append(log_seconds)
    profile = {name: median(p[name] for p in profiles) for name in profiles[0]}
    profile["logging"] = median(logging)
    result = Result(
        "Trainer.fit, dearer than a bare loop",
        median(overhead),
        3.0,
        "lower",
        "%",
        spread(overhead, 1) + "; W&B offline, no checkpoint within",
    )
    return result, profile


def _bare_seconds(ours: Ours, rows: Rows) -> tuple[float, dict[str, float]]:
    """Return the seconds of a step in a plain loop, in total and by part."""
    ours.use(lisa())
    ours.step(batch(rows.sst2, 5, 0))
    started, profiles = perf_counter(), []
    for t in range(1, FIT_STEPS):
        ours.step(batch(rows.sst2, 5, t))
        profiles.append(ours.seconds)
    seconds = (perf_counter() - started) / (FIT_STEPS - 1)
    return seconds, {name: sum(p[name] for p in profiles) / len(profiles) for name in profiles[0]}


class _Clock(L.Callback):
    """Callback that measures the seconds per step between the ends of the first and the last, loading included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(perf_counter())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


class _TimedLogger(CurvesLogger):
    """Logger that measures the seconds of writing the curves."""

    seconds = 0.0

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log the metrics of a step, timed."""
        started = perf_counter()
        super().log_metrics(metrics, step)
        self.seconds += perf_counter() - started


class _InOrder(LisaDataModule):
    """Batches of the rows in file order, so that both loops train on the same ones."""

    def connect(self, *arguments: Any, **more: Any) -> None:
        super().connect(*arguments, **more)
        self.steps._row = lambda stream, position: position  # type: ignore[method-assign]

    def _example(self, row: Any) -> Example:
        return row


def _fit_seconds(folder: Path, rows: Rows) -> tuple[float, float]:
    """Return the seconds of a step inside `Trainer.fit`, and those of its logging."""
    method = lisa()
    optim = Optim(lr=1e-4, steps=FIT_STEPS, batch_size=5, schedule="constant", warmup_ratio=0.0)
    net = attach(load(folder, "float32"), LORA, seed=0)
    randomize(list(trainable(net).values()))
    examples: Any = rows.sst2
    data = _InOrder(None, user=examples, alignment=examples, max_length=2048)
    with tempfile.TemporaryDirectory() as out:
        os.environ.setdefault("WANDB_MODE", "offline")
        loggers = RunLoggers(Path(out), {"project": "benchmark"}, resumed=False)
        timed = _TimedLogger(loggers.curves, "finetune")
        stage_loggers = [timed, WandbLogger(loggers.wandb, "finetune")]
        clock = _Clock()
        checkpoint = Checkpoint(Path(out) / "bench.ckpt", every=20)
        callbacks = [ResumeCurves(loggers, "finetune"), clock]
        fit(LisaModule(net, method, optim), data, TRAINER, checkpoint, callbacks, stage_loggers, "bench")
        loggers.wandb.finish(failed=False)
    return clock.seconds, timed.seconds / FIT_STEPS


def arithmetic(net: nn.Module, config: Any, packs: Sequence[Pack]) -> float:
    """Return the floating-point operations that a step needs.

    - Forward: products with the weights, and attention to ancestors.
    - Backward: towards the inputs, down to the first adapter, and towards the weights of the adapter only.

    Args:
        net: model with an adapter.
        config: config of the base model.
        packs: packs of the step.
    """
    tokens = sum(p.ids.numel() for p in packs)
    supervised = sum(p.targets.numel() for p in packs)
    pairs = sum(int(p.mask.sum()) for p in packs)
    predicting = sum(p.logit_positions.unique().numel() for p in packs)
    total = 0.0
    for name, module in net.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        size = module.weight.numel()
        if module.weight.requires_grad:
            total += 3 * 2 * tokens * size
        elif module.out_features == config.vocab_size:
            total += 2 * 2 * supervised * size
        else:
            # The inputs of these modules are frozen embeddings.
            below = ".layers.0.self_attn." in name and "o_proj" not in name
            last = f".layers.{config.num_hidden_layers - 1}." in name and not name.endswith(("k_proj", "v_proj"))
            total += (1 if below else 2) * 2 * (predicting if last else tokens) * size
    width = config.num_attention_heads * config.head_dim
    total += config.num_hidden_layers * (4 + 8) * pairs * width
    return total


@torch.no_grad()
def product_peak(net: nn.Module, config: Any, packs: Sequence[Pack]) -> float:
    """Return operations per second of the products of a step: every frozen weight, once forward and once backward.

    Each product is computed by the faster of torch's two routines.

    Args:
        net: model with an adapter.
        config: config of the base model.
        packs: packs of the step.
    """
    tokens, supervised = sum(p.ids.numel() for p in packs), sum(p.targets.numel() for p in packs)
    inputs: dict[tuple[int, int], Tensor] = {}
    spent = done = 0.0
    for module in net.modules():
        if not isinstance(module, nn.Linear) or module.weight.requires_grad:
            continue
        rows = supervised if module.out_features == config.vocab_size else tokens
        for weight in (module.weight, module.weight.t()):
            x = inputs.setdefault((rows, weight.shape[1]), torch.randn(rows, weight.shape[1]))
            spent += min(
                _product_seconds(product, x, weight) for product in 2 * (F.linear, partial(onednn_linear, bias=None))
            )
            done += 2 * rows * weight.numel()
    return done / spent


def _product_seconds(product: Any, x: Tensor, weight: Tensor) -> float:
    started = perf_counter()
    product(x, weight)
    return perf_counter() - started


def rate(ours: Ours, rows: Rows) -> list[Result]:
    """Measure the needed operations per second, as a share of those of plain products with the same shapes."""
    config = ours.net.get_base_model().config
    results = []
    for size in (5, 16):
        shares, rates, peaks = [], [], []
        for i in range(REPETITIONS + 1):
            # Shapes repeat, so that nothing is compiled while timed.
            examples = batch(rows.sst2, size, i % 2)
            packs = pack(examples)
            needed, peak = arithmetic(ours.net, config, packs), product_peak(ours.net, config, packs)
            started = perf_counter()
            ours.step(examples)
            achieved = needed / (perf_counter() - started)
            if i > 1:
                shares.append(100 * achieved / peak)
                rates.append(achieved / 1e9)
                peaks.append(peak / 1e9)
        note = f"{median(rates):.0f} of {median(peaks):.0f} GFLOP/s; {spread(shares, 0)}"
        what = f"needed arithmetic of the training step, share of the product peak, batch {size}"
        results.append(Result(what, median(shares), 60.0, "higher", "%", note))
    return results
