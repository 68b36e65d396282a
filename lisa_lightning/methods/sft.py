"""Supervised fine-tuning on one stream alone: no defense."""

from typing import final

from lisa_lightning.methods.method import Method
from lisa_lightning.schedule import Schedule, State


@final
class SFT(Method):
    """Plain training: on the user's rows the papers' undefended baseline, on alignment rows plain alignment.

    One forward and one backward pass a step.

    Args:
        stream: whose rows: `user` or `alignment`.
    """

    def __init__(self, stream: State = "user") -> None:
        super().__init__(Schedule(*((0, 1) if stream == "user" else (1, 0))))
