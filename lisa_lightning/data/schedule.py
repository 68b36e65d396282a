"""Schedule of alignment and user steps as pure integer arithmetic; start reading at `Schedule.state`.

All classes are immutable, so no checkpoint is needed, and prefetching workers and ranks agree.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["alignment", "user"]
Stream = Literal["alignment", "user", "defender"]
"""Source of batches: the provider's alignment rows, the user's rows or the provider's harmful rows (defender)."""


@dataclass(frozen=True, slots=True)
class StreamBatch:
    """Position and size of a step's batch of one stream."""

    steps_before: int
    """Number of earlier steps that drew from the stream."""
    size: int | None = None
    """Rows of the step over all micro-batches and ranks; None for the batch size of `optim`."""
    further: tuple[int, ...] = ()
    """Rows of each further batch of the step. Sizes must be equal in all steps that draw from the stream."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cycles of `alignment_steps` (K1) and `user_steps` (K2) optimizer steps (Lisa, Algorithms 1 and 2).

    The states equal those of the official code's state machine for all K1 and K2. A state of length 0 is never entered.
    """

    alignment_steps: int
    user_steps: int
    user_first: bool = False
    """Begin each cycle with its user steps. Lisa begins with its alignment steps."""

    def __post_init__(self) -> None:
        if self.alignment_steps < 0 or self.user_steps < 0 or self.alignment_steps + self.user_steps == 0:
            raise ValueError(
                f"alignment_steps={self.alignment_steps} and user_steps={self.user_steps}: "
                "neither may be negative and at least one must be positive"
            )

    def state(self, step: int) -> State:
        """Return the state of the optimizer step with 0-based index `step`."""
        in_cycle = (step + self._skipped) % (self.alignment_steps + self.user_steps)
        return "alignment" if in_cycle < self.alignment_steps else "user"

    def switches_at(self, step: int) -> bool:
        """Return whether the state changes at the start of `step`."""
        return step > 0 and self.state(step) != self.state(step - 1)

    def steps_in(self, state: State, end: int) -> int:
        """Return the number of steps in `state` among the steps 0 .. end-1."""
        cycles, remainder = divmod(end + self._skipped, self.alignment_steps + self.user_steps)
        alignment = cycles * self.alignment_steps + min(remainder, self.alignment_steps) - self._skipped
        return alignment if state == "alignment" else end - alignment

    @property
    def _skipped(self) -> int:
        """Alignment steps that the first cycle skips, so that it begins with its user steps."""
        return self.alignment_steps if self.user_first else 0
