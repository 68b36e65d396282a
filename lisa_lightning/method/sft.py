"""Supervised fine-tuning on the user's rows alone: no defense."""

from typing import final

from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


@final
class SFT(Method):
    """Plain training on the user's rows, the papers' undefended baseline. One forward and one backward pass a step."""

    def __init__(self) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
