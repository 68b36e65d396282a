"""Loss scaling for training under float16 autocast (`trainer.precision=16-mixed`). Start at `LossScale`."""

from collections.abc import Sequence
from typing import Final, TypedDict, final

import torch
from torch import Tensor

from lisa_lightning.runtime.errors import NotFiniteError

INITIAL_SCALE: Final = 2.0**16
MIN_SCALE: Final = 1.0
"""A gradient that overflows at this scale would overflow without scaling too."""
GROWTH_STEPS: Final = 2000
"""Steps in a row without overflow after which the scale doubles."""


class GradientOverflowError(Exception):
    """Error for a gradient of a scaled loss that is infinite or NaN on some rank."""


class LossScaleState(TypedDict):
    """Part of a checkpoint."""

    value: float
    good_steps: int


@final
class LossScale:
    """Factor of every loss in its backward pass, so that gradients do not underflow in float16.

    It follows torch's GradScaler, which allows only one backward pass a step:

        - It is a power of two, so that scaling rounds nothing.
        - A step with an infinite or NaN gradient is skipped and halves the scale.
        - 2000 steps in a row without one double it.

    Args:
        value: the initial scale, a power of two.
    """

    def __init__(self, value: float = INITIAL_SCALE) -> None:
        self.value = value
        self.good_steps = 0
        """Steps since the scale changed."""

    def gradients(self, loss: Tensor, inputs: Sequence[Tensor], allow_unused: bool = False) -> tuple[Tensor, ...]:
        """Return the gradients of the unscaled loss, in float32."""
        scaled = torch.autograd.grad(loss * self.value, inputs, allow_unused=allow_unused)
        # In float16 the unscaled gradients would underflow after all.
        return tuple(gradient if gradient is None else gradient.float() / self.value for gradient in scaled)

    def update(self, skipped: bool) -> None:
        """Adapt the scale after a step.

        Raises:
            NotFiniteError: if the step was skipped at the smallest scale.
        """
        if skipped and self.value <= MIN_SCALE:
            raise NotFiniteError(
                "trainer.precision=16-mixed: gradients are infinite or NaN in float16 even at the loss scale "
                f"{self.value:g}. Fix: trainer.precision=bf16-mixed or 32-true, or a smaller learning rate."
            )
        self.good_steps = 0 if skipped else self.good_steps + 1
        if skipped:
            self.value /= 2
        elif self.good_steps == GROWTH_STEPS:
            self.value *= 2
            self.good_steps = 0

    def state_dict(self) -> LossScaleState:
        """Return the part of a checkpoint with which training continues exactly."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state_dict(self, state: LossScaleState) -> None:
        """Restore the scale of a checkpoint."""
        self.value, self.good_steps = state["value"], state["good_steps"]
