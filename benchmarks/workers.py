"""Ours and the reference's training steps, each in a process of its own that rests while the other works.

Apart, because how a process treats its freed memory is part of what is compared.
"""

from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks import reference, training
from benchmarks.setting import LORA, REPETITIONS, RHO, Result, Rows, ratio, spread
from lisa_lightning.data.packing import Example, pack
from lisa_lightning.model.lora import trainable
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.runtime.memory import keep_freed_memory, peak_mib, watch


class _Ours(training.Ours):
    """As every run: freed memory is kept."""

    def __init__(self, folder: Path) -> None:
        keep_freed_memory()
        super().__init__(folder, training.lisa())

    def mean_loss(self, rows: Sequence[Example]) -> Tensor:
        return completion_loss(self.net.get_base_model(), pack(rows)) / sum(r.supervised for r in rows)


class _Theirs:
    """The published form."""

    def __init__(self, folder: Path) -> None:
        self.net = reference.adapted(folder, LORA)
        self.weights = list(trainable(self.net).values())
        training.stir(self.weights)
        self.anchor = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.0)

    def step(self, rows: Sequence[Example]) -> float:
        """One step, the padding of its rows included."""
        return reference.step(self.net, self.optimizer, self.weights, self.anchor, RHO, rows)

    def mean_loss(self, rows: Sequence[Example]) -> Tensor:
        return reference.loss(self.net, rows)


class Worker:
    """One of the two in a process of its own."""

    def __init__(self, form: type[_Ours] | type[_Theirs], folder: Path) -> None:
        context = get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(form, folder, other), daemon=True)
        self.process.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.send(None)
        self.process.join()

    def gradient(self, rows: Sequence[Example]) -> tuple[float, list[Any]]:
        """Loss and the gradient of every adapter weight."""
        self.connection.send(("gradient", list(rows)))
        return self.connection.recv()

    def step(self, rows: Sequence[Example]) -> tuple[float, float]:
        """Seconds of a step, and the process's peak memory in it (MiB, model included)."""
        self.connection.send(("step", list(rows)))
        return self.connection.recv()


def _serve(form: Any, folder: Path, connection: Any) -> None:
    trainer = form(folder)
    while asked := connection.recv():
        what, rows = asked
        if what == "gradient":
            trainer.optimizer.zero_grad()
            loss = trainer.mean_loss(rows)
            loss.backward()
            connection.send((loss.item(), [w.grad.numpy() for w in trainer.weights]))
        else:
            watch(torch.device("cpu"))
            started = perf_counter()
            trainer.step(rows)
            connection.send((perf_counter() - started, peak_mib(torch.device("cpu"))))


def measure(folder: Path, rows: Rows) -> list[Result]:
    """Steps of both on the same batches in turn, once loss and gradients are known to be equal."""
    results = []
    shortest = min(row.length for row in rows.alignment)
    with Worker(_Ours, folder) as ours, Worker(_Theirs, folder) as theirs:
        for name, examples, size, target in (
            (f"training step, {rows.source}, batch 5", rows.sst2, 5, 2.4),
            (f"training step, {rows.source}, batch 16", rows.sst2, 16, 4.0),
            (f"training step, alignment rows of {shortest} to 256 tokens, batch 5", rows.alignment, 5, 1.4),
        ):
            apart = _require_equal(ours, theirs, training.batch(examples, size, 0))
            speeds, shares, peaks = [], [], []
            for i in range(REPETITIONS + 1):
                chosen = training.batch(examples, size, i)
                (slow, large), (fast, small) = theirs.step(chosen), ours.step(chosen)
                if i:  # the first is to warm up
                    speeds.append(slow / fast)
                    shares.append(small / large)
                    peaks.append((small, large))
            results.append(ratio(name, speeds, target, apart))
            if size == 16:
                sizes = " of ".join(f"{median(p):.0f}" for p in zip(*peaks, strict=True))
                note = f"{sizes} MiB, model included; {spread(shares)}"
                what = "peak memory of a training step, batch 16"
                results.append(Result(what, median(shares), 0.45, "lower", "of the reference's", note))
    return results


def _require_equal(ours: Worker, theirs: Worker, rows: Sequence[Example]) -> str:
    """Stop unless loss and gradients are those of the reference; else how far they are apart."""
    (found, own), (wanted, others) = ours.gradient(rows), theirs.gradient(rows)
    loss = abs(found - wanted)
    gaps = [float(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5) for a, b in zip(own, others, strict=True)]
    gradient = max(gaps)
    if not (loss <= 1e-5 and all(gap <= 1e-4 for gap in gaps)):  # a gap that is no number is none of these
        raise SystemExit(f"not the reference's loss (off by {loss:.1e}) or gradients (off by {gradient:.1e}, relative)")
    return f"loss off by {loss:.0e}, gradients by {gradient:.0e}"
