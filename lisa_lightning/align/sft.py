"""Supervised fine-tuning on alignment rows: plain alignment."""

from typing import final

from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


@final
class SFT(Method):
    """Plain training on the alignment rows alone. One forward and one backward pass a step."""

    def __init__(self) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
