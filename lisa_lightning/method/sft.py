"""Supervised fine-tuning on the user's rows: no defense."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT
from lisa_lightning.method.base import Method


@final
@dataclass(frozen=True, config=STRICT)
class SFT(Method):
    """Train on the user's rows. One forward and one backward pass a step."""
