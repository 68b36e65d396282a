"""Supervised fine-tuning on alignment rows: plain alignment."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.align.base import Aligner
from lisa_lightning.config.fields import STRICT


@final
@dataclass(frozen=True, config=STRICT)
class SFT(Aligner):
    """Train on the alignment rows. One forward and one backward pass a step."""
