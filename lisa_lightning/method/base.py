"""What the training loop asks of a defense: which streams a step draws, and what gradient it makes of them."""

from collections.abc import Mapping, Sequence, Set
from typing import final

from torch import Tensor

from lisa_lightning.config.requirements import Need
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Draw, Schedule, Stream
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.proximal import snapshot, squared_distance


class Method:
    """A training-time defense, at alignment or at fine-tuning.

    The anchor is the trainable weights at the last switch (before the first: at the start). It is what the official
    Lisa code keeps as two snapshots, since the other state's last iterate is where this state starts. A method without
    switches has the weights that it started from.
    """

    needs: Set[Need] = frozenset()
    """What it can't do without."""
    safe_ratio: float = 0.0
    """Share of the user's rows whose place alignment rows take."""
    rows_apart: Set[Stream] = frozenset()
    """Streams whose rows are padded: no token may stand for several rows. (`Pack.rows` tells a trie's rows apart.)"""
    paired: bool = False
    """Whether row i of one stream belongs to row i of the others."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.kept: dict[str, list[Tensor]] = {}
        """What a resumed run takes over from the checkpoint."""
        self.total_steps = 0

    def draws(self, step: int) -> Mapping[Stream, Draw]:
        """The streams of a step, the one that it is about first."""
        state = self.schedule.state(step)
        return {state: Draw(self.schedule.steps_in(state, step))}

    @final
    def begin(self, passes: Passes, total_steps: int) -> None:
        """Called once, before the first step or before a checkpoint is restored.

        Raises:
            UserError: the model isn't one that the method can work on.
        """
        self.kept["anchor"] = snapshot(passes.weights)
        self.total_steps = total_steps
        self.prepare(passes)

    def prepare(self, passes: Passes) -> None:
        """What a method finds or works out before the first step, such as blocks to hook."""

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """The gradient to descend along, before clipping: that of the loss, unless a method says another.

        The weights must be what they were afterwards.
        """
        return Descent(*passes.gradient(step.main))

    @property
    @final
    def anchor(self) -> list[Tensor]:
        """The weights at the last switch, float32."""
        return self.kept["anchor"]

    @final
    def before_step(self, step: int, weights: Sequence[Tensor]) -> dict[str, float]:
        """At a switch, measure the drift of the state that ended and move the anchor here."""
        if not self.schedule.switches_at(step):
            return {}
        drift = squared_distance(weights, self.anchor).item()
        self.kept["anchor"] = snapshot(weights)
        return {"switch/drift": drift}

    @final
    def after_step(self, weights: Sequence[Tensor]) -> dict[str, float]:
        """Measure ||w - anchor||^2."""
        return {"proximal/drift": squared_distance(weights, self.anchor).item()}
