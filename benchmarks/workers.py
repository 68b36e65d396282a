"""Training steps of ours and of the reference, in two processes that work in turn. Start at `measure`.

The processes are separate, because the comparison includes how a process treats freed memory.
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
from lisa_lightning.model.factors import trainable
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.runtime.memory import keep_freed_memory, peak_memory_mib, reset_peak_memory


class _Ours(training.Ours):
    """Our training step. Freed memory is kept, as in every run."""

    def __init__(self, folder: Path) -> None:
        keep_freed_memory()
        super().__init__(training.adapted(folder), training.lisa())

    def mean_loss(self, rows: Sequence[Example]) -> Tensor:
        """Return the mean cross-entropy over supervised tokens."""
        return completion_loss(self.net.get_base_model(), pack(rows)) / sum(r.supervised for r in rows)


class _Theirs:
    """Training step of the reference."""

    def __init__(self, folder: Path) -> None:
        self.net = reference.adapted(folder, LORA)
        self.weights = list(trainable(self.net).values())
        training.randomize(self.weights)
        self.anchor = [w.detach().clone() for w in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, weight_decay=0.0)

    def step(self, rows: Sequence[Example]) -> float:
        """Make one step, including the padding of its rows, and return its loss."""
        return reference.step(self.net, self.optimizer, self.weights, self.anchor, RHO, rows)

    def mean_loss(self, rows: Sequence[Example]) -> Tensor:
        """Return the mean cross-entropy over supervised tokens."""
        return reference.loss(self.net, rows)


class Worker:
    """One of the two trainers in a separate process, which ends with the context."""

    def __init__(self, form: type[_Ours] | type[_Theirs], folder: Path) -> None:
        context = get_context("spawn")
        self.connection, worker_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(form, folder, worker_end), daemon=True)
        self.process.start()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.send(None)
        self.process.join()

    def gradient(self, rows: Sequence[Example]) -> tuple[float, list[Any]]:
        """Return the loss, and the gradient of every adapter weight."""
        self.connection.send(("gradient", list(rows)))
        return self.connection.recv()

    def step(self, rows: Sequence[Example]) -> tuple[float, float]:
        """Return the seconds of a step, and the peak memory of the process in it (MiB, model included)."""
        self.connection.send(("step", list(rows)))
        return self.connection.recv()


def _serve(form: Any, folder: Path, connection: Any) -> None:
    """Answer requests of a `Worker` until None arrives."""
    trainer = form(folder)
    while request := connection.recv():
        action, rows = request
        if action == "gradient":
            trainer.optimizer.zero_grad()
            loss = trainer.mean_loss(rows)
            loss.backward()
            connection.send((loss.item(), [w.grad.numpy() for w in trainer.weights]))
        else:
            reset_peak_memory(torch.device("cpu"))
            started = perf_counter()
            trainer.step(rows)
            connection.send((perf_counter() - started, peak_memory_mib(torch.device("cpu"))))


def measure(folder: Path, rows: Rows) -> list[Result]:
    """Compare steps of both on the same batches in turn.

    Raises:
        SystemExit: if loss or gradients differ.
    """
    results = []
    shortest = min(row.length for row in rows.alignment)
    with Worker(_Ours, folder) as ours, Worker(_Theirs, folder) as theirs:
        for name, examples, size, target in (
            (f"training step, {rows.source}, batch 5", rows.sst2, 5, 2.4),
            (f"training step, {rows.source}, batch 16", rows.sst2, 16, 4.0),
            (f"training step, alignment rows of {shortest} to 256 tokens, batch 5", rows.alignment, 5, 1.4),
        ):
            difference = _require_equal(ours, theirs, training.batch(examples, size, 0))
            speeds, shares, peaks = [], [], []
            for i in range(REPETITIONS + 1):
                batch = training.batch(examples, size, i)
                (slow, large), (fast, small) = theirs.step(batch), ours.step(batch)
                if i:  # the first step warms up
                    speeds.append(slow / fast)
                    shares.append(small / large)
                    peaks.append((small, large))
            results.append(ratio(name, speeds, target, difference))
            if size == 16:
                sizes = " of ".join(f"{median(p):.0f}" for p in zip(*peaks, strict=True))
                note = f"{sizes} MiB, model included; {spread(shares)}"
                what = "peak memory of a training step, batch 16"
                results.append(Result(what, median(shares), 0.45, "lower", "of the reference's", note))
    return results


def _require_equal(ours: Worker, theirs: Worker, rows: Sequence[Example]) -> str:
    """Return the differences of loss and gradients as text.

    Raises:
        SystemExit: if loss or gradients are not those of the reference.
    """
    (our_loss, our_gradients), (their_loss, their_gradients) = ours.gradient(rows), theirs.gradient(rows)
    loss = abs(our_loss - their_loss)
    gaps = [
        float(((a - b) ** 2).sum() ** 0.5 / (b**2).sum() ** 0.5)
        for a, b in zip(our_gradients, their_gradients, strict=True)
    ]
    gradient = max(gaps)
    if not (loss <= 1e-5 and all(gap <= 1e-4 for gap in gaps)):  # NaN fulfils neither condition
        raise SystemExit(f"loss or gradients differ from the reference's: {loss:.1e} absolute, {gradient:.1e} relative")
    return f"loss off by {loss:.0e}, gradients by {gradient:.0e}"
