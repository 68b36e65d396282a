"""Bi-state optimization: alternate between alignment rows and user rows, nothing else."""

from typing import final

from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


@final
class BSO(Method):
    """K1 steps on alignment rows, K2 on the user's, in turn (Huang et al., NeurIPS 2024, Algorithm 1).

    One forward and one backward pass a step: alignment steps take the place of user steps. Departure of the official
    code from the paper: user rows drawn during alignment steps are thrown away (`data.during_alignment=discard`).
    """

    def __init__(self, alignment_steps: int, user_steps: int) -> None:
        super().__init__(Schedule(alignment_steps, user_steps))
