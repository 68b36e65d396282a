"""How an adapter is optimized: AdamW's settings, how many steps, and the learning rate of each."""

import math
from dataclasses import dataclass, fields
from typing import Any


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

    @classmethod
    def of(cls, cfg: Any, rows: int, ranks: int) -> "Optim":
        """As configured; epochs over so many rows as steps."""
        settings: dict[str, Any] = {field.name: cfg[field.name] for field in fields(cls)}
        if cfg.steps is None:
            settings["steps"] = cfg.epochs * -(-rows // (cfg.batch_size * cfg.accumulate * ranks))
        settings["betas"] = tuple(cfg.betas)
        return cls(**settings)

    def lr_at(self, step: int) -> float:
        """The learning rate of a 0-based step; `constant` has no warm-up, as in the official runs."""
        if self.schedule == "constant":
            return self.lr
        warmup = math.ceil(self.warmup_ratio * self.steps)
        if step < warmup:
            return self.lr * step / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done)
