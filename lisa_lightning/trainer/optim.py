"""How an adapter is optimized: AdamW's settings, how many steps, and the learning rate of each."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf


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
    key: str = field(default="optim", kw_only=True)
    """Where the config says so."""

    @classmethod
    def of(cls, config: DictConfig, key: str, rows: int, ranks: int) -> "Optim":
        """As the config says under this key; epochs over so many rows as steps."""
        cfg: Any = OmegaConf.select(config, key)
        settings: dict[str, Any] = {f.name: cfg[f.name] for f in fields(cls) if f.name != "key"}
        if cfg.steps is None:
            settings["steps"] = cfg.epochs * -(-rows // (cfg.batch_size * cfg.accumulate * ranks))
        settings["betas"] = tuple(cfg.betas)
        return cls(**settings, key=key)

    def lr_at(self, step: int) -> float:
        """The learning rate of a 0-based step; `constant` has no warm-up, as in the official runs."""
        if self.schedule == "constant":
            return self.lr
        warmup = math.ceil(self.warmup_ratio * self.steps)
        if step < warmup:
            return self.lr * step / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done)
