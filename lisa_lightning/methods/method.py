"""What the training loop asks of a defense: which streams a step draws, and what is added to its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from torch import Tensor

from lisa_lightning.proximal import add_gradient, snapshot, squared_distance
from lisa_lightning.schedule import Schedule


class Method(ABC):
    """A defense at fine-tuning time: a schedule of states, an anchor that is renewed at every switch, a penalty.

    The anchor is the trainable weights at the last switch (before the first: at the start). It is what the official
    Lisa code keeps as two snapshots, since the other state's last iterate is where this state starts.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.anchor: list[Tensor] = []
        self.total_steps = 0

    @final
    def begin(self, weights: Sequence[Tensor], total_steps: int) -> None:
        """Called once, before the first step or before a checkpoint is restored."""
        self.anchor = snapshot(weights)
        self.total_steps = total_steps

    @final
    def before_step(self, step: int, weights: Sequence[Tensor]) -> dict[str, float]:
        """At a switch, measure the drift of the state that ended and move the anchor here."""
        if not self.schedule.switches_at(step):
            return {}
        drift = squared_distance(weights, self.anchor).item()
        self.anchor = snapshot(weights)
        return {"switch/drift": drift}

    @final
    def drift(self, weights: Sequence[Tensor]) -> float:
        """||w - anchor||^2 now."""
        return squared_distance(weights, self.anchor).item()

    @final
    def pull(self, step: int, weights: Sequence[Tensor], rho: float, warmup_ratio: float) -> float:
        """Add rho * (w - anchor) to the gradients once the warm-up is over, and return the penalty."""
        if rho == 0 or step <= warmup_ratio * self.total_steps:
            return 0.0
        return add_gradient(weights, self.anchor, rho).item()

    @abstractmethod
    def penalize(self, step: int, weights: Sequence[Tensor]) -> float:
        """Add the penalty's gradient to the weights' gradients, between backward and clipping; return the penalty."""
