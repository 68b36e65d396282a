"""Which streams an optimizer step draws from, as pure integer arithmetic.

Nothing here is mutable, so there is nothing to checkpoint and nothing on which prefetching workers or ranks could
disagree.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["alignment", "user"]
Stream = Literal["alignment", "user", "defender"]
"""A source of batches: the provider's rows, the user's, and harmful ones that the provider has to defend with."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A step's rows of one stream."""

    before: int
    """How many steps have drawn from the stream before."""
    rows: int | None = None
    """Rows of the whole step, over micro-batches and ranks; None: as many as `optim` says."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Cycles of `alignment_steps` (K1) and `user_steps` (K2) optimizer steps (Lisa, Algorithms 1 and 2).

    Equal to the state machine of the official code for all K1, K2; a state of length 0 is never entered.
    """

    alignment_steps: int
    user_steps: int

    def __post_init__(self) -> None:
        if self.alignment_steps < 0 or self.user_steps < 0 or self.alignment_steps + self.user_steps == 0:
            raise ValueError(
                f"alignment_steps={self.alignment_steps} and user_steps={self.user_steps}: "
                "neither may be negative and at least one must be positive"
            )

    def state(self, step: int) -> State:
        """The state of the optimizer step with 0-based index `step`."""
        in_cycle = step % (self.alignment_steps + self.user_steps)
        return "alignment" if in_cycle < self.alignment_steps else "user"

    def switches_at(self, step: int) -> bool:
        """Whether the state changes at the start of `step`."""
        return step > 0 and self.state(step) != self.state(step - 1)

    def steps_in(self, state: State, before: int) -> int:
        """How many of the steps 0 .. before-1 are in `state`."""
        cycles, rest = divmod(before, self.alignment_steps + self.user_steps)
        alignment = cycles * self.alignment_steps + min(rest, self.alignment_steps)
        return alignment if state == "alignment" else before - alignment
