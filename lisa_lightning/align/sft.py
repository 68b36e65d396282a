"""Supervised fine-tuning on alignment rows: plain alignment."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


@final
@dataclass(frozen=True, config=STRICT)
class SFT(Method):
    """Train on the alignment rows. One forward and one backward pass a step."""

    @property
    def schedule(self) -> Schedule:
        """Alignment steps only."""
        return Schedule(alignment_steps=1, user_steps=0)
