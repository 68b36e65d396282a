"""How near a training step is to what the machine can do, what surrounds it, and where its time goes."""

import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setting import LORA, REPETITIONS, RHO, Result, Rows, spread
from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.record import Record
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.interleave import Batch, Examples, Step, StepBatches
from lisa_lightning.data.packing import Example, Pack, pack
from lisa_lightning.logger.wandb import Tracker
from lisa_lightning.method.base import Method
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.frozen_linear import product_by_onednn
from lisa_lightning.model.lora import attach, load, trainable
from lisa_lightning.objective.backprop import Descent, Passes, Share
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.trainer.module import LisaModule
from lisa_lightning.trainer.optim import Optim

FIT_STEPS = 9
TRAINER = SimpleNamespace(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", precision="32-true")


def lisa() -> Lisa:
    """The penalty on from the second step on, user rows only (the batches are given)."""
    return Lisa(alignment_steps=0, user_steps=1, rho=RHO, proximal_after=0.0)


class _TimedPasses(Passes):
    """Notes what forward passes take."""

    forward = 0.0

    def mean_loss(self, batch: Batch) -> Share:
        share = super().mean_loss(batch)

        def timed(packs: Sequence[Pack]) -> Tensor:
            started = perf_counter()
            loss = share(packs)
            self.forward += perf_counter() - started
            return loss

        return timed


class Ours:
    """The training step of `LisaModule`, without Lightning around it."""

    def __init__(self, folder: Path, method: Method) -> None:
        self.net = attach(load(folder, "float32"), LORA, seed=0)
        self.passes = _TimedPasses(self.net, whole=lambda stream, size: iter(()))
        self.weights = self.passes.weights
        stir(self.weights)
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.0, foreach=True)
        self.use(method)

    def use(self, method: Method) -> None:
        """Train under this method from here on."""
        self.method = method
        method.begin(self.passes, total_steps=1)

    def step(self, rows: Sequence[Example]) -> float:
        """One step, the packing of its rows included."""
        started = perf_counter()
        rows_of_step = Batch("user", [pack(rows)], sum(r.supervised for r in rows))
        self.seconds = {"data": perf_counter() - started}
        self._timed("penalty", lambda: self.method.before_step(1, self.weights))
        self.passes.forward = 0.0
        descent = self._timed("backward", lambda: self.method.gradient(self.passes, Step(1, {"user": rows_of_step})))
        self.seconds["forward"] = self.passes.forward
        self.seconds["backward"] -= self.passes.forward
        self._timed("optimizer", lambda: self._descend(descent))
        self._timed("penalty", lambda: self.method.after_step(self.weights))
        return descent.loss

    def _descend(self, descent: Descent) -> None:
        for weight, gradient in zip(self.weights, descent.gradient, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()

    def _timed(self, part: str, call: Any) -> Any:
        started = perf_counter()
        result = call()
        self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - started
        return result


def stir(weights: Sequence[Tensor]) -> None:
    """Make a fresh adapter's zero factors count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in weights:
            w.copy_(torch.randn(w.shape, generator=generator) * 0.02)


def batch(rows: Sequence[Example], size: int, i: int) -> Sequence[Example]:
    """The i-th batch."""
    return rows[i * size : (i + 1) * size]


def lisa_against_sft(ours: Ours, rows: Rows, repetitions: int = 15) -> Result:
    """What the penalty costs; every batch under both methods, in changing order.

    Drift is measured under both, and a switch, once in a cycle, costs one more copy of the adapter.
    """
    methods = {"lisa": lisa(), "sft": SFT()}
    found = []
    for i in range(repetitions + 1):
        taken = {}
        for name in ("lisa", "sft") if i % 2 else ("sft", "lisa"):
            ours.use(methods[name])
            started = perf_counter()
            ours.step(batch(rows.sst2, 5, i))
            taken[name] = perf_counter() - started
        found.append(100 * (taken["lisa"] / taken["sft"] - 1))
    cost = median(found[1:])
    return Result("Lisa's step, dearer than SFT's", cost, 1.0, "lower", "%", spread(found[1:], 1))


def fit_against_bare(ours: Ours, folder: Path, rows: Rows) -> tuple[Result, dict[str, float]]:
    """Lightning, curves and W&B around the same steps; also the seconds of a step by part."""
    overhead, parts, logging = [], [], []
    for _ in range(REPETITIONS):
        bare, found = _bare_seconds(ours, rows)
        inside, wrote = _fit_seconds(folder, rows)
        overhead.append(100 * (inside / bare - 1))
        parts.append(found | {"the rest": bare - sum(found.values())})
        logging.append(wrote)
    profile = {name: median(p[name] for p in parts) for name in parts[0]}
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
    ours.use(lisa())
    ours.step(batch(rows.sst2, 5, 0))
    started, parts = perf_counter(), []
    for t in range(1, FIT_STEPS):
        ours.step(batch(rows.sst2, 5, t))
        parts.append(ours.seconds)
    taken = (perf_counter() - started) / (FIT_STEPS - 1)
    return taken, {name: sum(p[name] for p in parts) / len(parts) for name in parts[0]}


class _InOrder(StepBatches):
    """The rows as they stand, so that both loops see the same batches."""

    def _row(self, stream: Any, position: int) -> int:
        return position


class _Clock(L.Callback):
    """Seconds a step from the end of the first to the end of the last, the loader's included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(perf_counter())

    @property
    def seconds(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


class _TimedTracker(Tracker):
    """Notes what writing the curves takes."""

    spent = 0.0

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        started = perf_counter()
        super().log(stage, step, metrics)
        self.spent += perf_counter() - started


def _fit_seconds(folder: Path, rows: Rows) -> tuple[float, float]:
    method = lisa()
    optim = Optim(1e-4, FIT_STEPS, 5, 1, 1.0, "constant", 0.0, 0.0, (0.9, 0.999), 1e-8)
    net = attach(load(folder, "float32"), LORA, seed=0)
    stir(list(trainable(net).values()))
    streams: Any = {name: Examples(rows.sst2, lambda e: e) for name in ("user", "alignment")}
    steps = _InOrder(streams, pack, method, FIT_STEPS, 5, 1, seed=0)
    module = LisaModule(Passes(net, steps.whole), method, optim, seed=0, key={})
    data = LisaDataModule(steps)
    with tempfile.TemporaryDirectory() as out:
        os.environ.setdefault("WANDB_MODE", "offline")
        tracker = _TimedTracker(Path(out), {"project": "benchmark"}, resumed=False)
        clock = _Clock()
        checkpoint = Checkpoint(Path(out) / "bench.ckpt", every=20, last=FIT_STEPS)
        fit(module, data, TRAINER, checkpoint, [Record(tracker, "finetune"), clock], "bench")
        tracker.finish(failed=False)
    return clock.seconds, tracker.spent / FIT_STEPS


def arithmetic(net: nn.Module, config: Any, packs: Sequence[Pack]) -> float:
    """Floating-point operations that a step can't do without: products with the weights, attention to ancestors.

    Forward, and backward towards the inputs, none below the first adapter; weights: the adapter alone.
    """
    tokens = sum(p.ids.numel() for p in packs)
    supervised = sum(p.targets.numel() for p in packs)
    pairs = sum(int(p.mask.sum()) for p in packs)
    predicting = sum(p.predictors.unique().numel() for p in packs)
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
            below = ".layers.0.self_attn." in name and "o_proj" not in name  # its input is the frozen embedding
            last = f".layers.{config.num_hidden_layers - 1}." in name and not name.endswith(("k_proj", "v_proj"))
            total += (1 if below else 2) * 2 * (predicting if last else tokens) * size
    width = config.num_attention_heads * config.head_dim
    total += config.num_hidden_layers * (4 + 8) * pairs * width
    return total


@torch.no_grad()
def product_peak(net: nn.Module, config: Any, packs: Sequence[Pack]) -> float:
    """Operations a second of the step's own products alone: every frozen weight once forward, once backward.

    Each by the faster of the two routines that torch has.
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
            spent += min(_once(product, x, weight) for product in 2 * (F.linear, partial(product_by_onednn, bias=None)))
            done += 2 * rows * weight.numel()
    return done / spent


def _once(product: Any, x: Tensor, weight: Tensor) -> float:
    started = perf_counter()
    product(x, weight)
    return perf_counter() - started


def rate(ours: Ours, rows: Rows) -> list[Result]:
    """The step's needed operations a second, as a share of the machine's own products at the same shapes."""
    config = ours.net.get_base_model().config
    results = []
    for size in (5, 16):
        shares, rates, peaks = [], [], []
        for i in range(REPETITIONS + 1):
            rows_ = batch(rows.sst2, size, i % 2)  # the same shapes again, so that nothing is compiled while timed
            packs = pack(rows_)
            needed, peak = arithmetic(ours.net, config, packs), product_peak(ours.net, config, packs)
            started = perf_counter()
            ours.step(rows_)
            found = needed / (perf_counter() - started)
            if i > 1:
                shares.append(100 * found / peak)
                rates.append(found / 1e9)
                peaks.append(peak / 1e9)
        note = f"{median(rates):.0f} of {median(peaks):.0f} GFLOP/s; {spread(shares, 0)}"
        what = f"needed arithmetic of the training step, share of the product peak, batch {size}"
        results.append(Result(what, median(shares), 60.0, "higher", "%", note))
    return results
