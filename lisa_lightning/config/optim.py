"""Optimization of an adapter: the settings of AdamW, the number of steps, and the learning rate of each step."""

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Strict
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import (
    STRICT,
    BatchSize,
    Count,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    Words,
)

Betas = Annotated[tuple[ShareBelowOne, ShareBelowOne], Strict(False), Words("a list of two numbers from 0 to below 1")]


@dataclass(frozen=True, config=STRICT)
class Optim:
    """Settings of a training: AdamW, its schedule, and the size of a step.

    Exactly one of `steps` and `epochs` is given.
    """

    lr: Positive = 1e-3
    """Learning rate. The paper's value is 1e-5, for a larger model and more steps."""
    steps: Count | None = 150
    """Optimizer steps, of both states together."""
    epochs: Count | None = None
    """Passes over the rows, counted over steps of both states. The paper's value is 20."""
    batch_size: BatchSize = 6
    """Rows of a micro-batch and rank. The paper's value is 5."""
    accumulate: BatchSize = 1
    """Micro-batches of a step."""
    clip: Positive | None = 1.0
    """Largest gradient norm; None for no clipping. The official code has 1."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """`constant` has no warm-up, as in the official code; `linear` and `cosine` have one."""
    warmup_ratio: Share = 0.1
    """Share of the steps with a rising learning rate. The official code has 0."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay. The official code has 0."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"steps={self.steps} and epochs={self.epochs}: one of them must be null, one not")

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps. Raises ValueError if only epochs are given."""
        if self.steps is None:
            raise ValueError("steps is None. Fix: give steps, or call for_rows")
        return self.steps

    def for_rows(self, rows: int, ranks: int) -> "Optim":
        """Return these settings with epochs over so many rows expressed as steps."""
        if self.epochs is None:
            return self
        steps = self.epochs * -(-rows // (self.batch_size * self.accumulate * ranks))
        return replace(self, steps=steps, epochs=None)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a 0-based step."""
        if self.schedule == "constant":
            return self.lr
        warmup = math.ceil(self.warmup_ratio * self.total_steps)
        if step < warmup:
            return self.lr * step / warmup
        progress = (step - warmup) / max(1, self.total_steps - warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1 - progress)
