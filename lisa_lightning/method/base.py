"""The interface of a training-time defense: `Method`, with the batches and the gradient of every optimizer step."""

from collections.abc import Callable, Mapping, Sequence, Set

from pydantic import SecretStr
from torch import Tensor

from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.dpp import DPP
from lisa_lightning.data.interleave import Step
from lisa_lightning.data.schedule import Schedule, Stream, StreamBatch
from lisa_lightning.data.source import Row
from lisa_lightning.model.factors import Factors
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.proximal import snapshot, squared_distance


class Method:
    """A training-time defense, at alignment or at fine-tuning. Without overrides it is SFT on the user's rows.

    Subclasses are frozen dataclasses of settings. What changes during training is in the state, which `init` returns
    and a checkpoint holds. Its entry `anchor` has the trainable weights at the last switch, before the first one those
    at the start. The official Lisa code keeps the same weights as two snapshots.
    """

    @property
    def requirements(self) -> Set[Requirement]:
        """Inputs that the config must provide."""
        return frozenset()

    @property
    def schedule(self) -> Schedule:
        """The cycle of alignment and user steps."""
        return Schedule(alignment_steps=0, user_steps=1)

    def lr_step(self, step: int) -> int:
        """Return the step whose learning rate applies at `step`."""
        return step

    @property
    def selection(self) -> DPP | None:
        """Selection of the alignment rows that the stage finetune uses; None for all of them."""
        return None

    @property
    def safe_share(self) -> float:
        """Share of the user's rows that alignment rows replace, 0..1."""
        return 0.0

    @property
    def trigger(self) -> SecretStr | None:
        """Secret text that the provider puts in front of every prompt's system prompt; None for none.

        Raises:
            UserError: if the file that holds it can't be used.
        """
        return None

    def mix(self, user: list[Row], draw_alignment: Callable[[int], list[Row]]) -> list[Row]:
        """Return the rows to fine-tune on in place of the user's.

        Args:
            user: the user's rows, harmful ones included.
            draw_alignment: returns a sample of alignment rows of this size.
        """
        return user

    @property
    def unpacked_streams(self) -> Set[Stream]:
        """Streams whose rows are padded instead of packed, so that no token stands for several rows."""
        return frozenset()

    @property
    def paired(self) -> bool:
        """True if row i of one stream belongs to row i of the others, so that all are drawn in one order."""
        return False

    def plan(self, step: int) -> Mapping[Stream, StreamBatch]:
        """Return the batches of a step by stream; the first one is the batch that the step is about."""
        state = self.schedule.state(step)
        return {state: StreamBatch(self.schedule.steps_in(state, step))}

    def init(self, backprop: Backprop) -> State:
        """Return the state before the first step.

        It is called on a model without weights too, to reject an unsuitable model before anything is trained.

        Raises:
            UserError: if the model lacks what the method works on.
        """
        return {"anchor": snapshot(backprop.weights)}

    def start(self, backprop: Backprop, state: State) -> State:
        """Prepare the model before the first step of a process, and return the state of that step.

        A method may set the weights at the start of a training, and install hooks. Hooks stay until the adapter is
        saved. After a resume, weights and state are those of the checkpoint, and hooks must be installed again.
        """
        return state

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return loss and gradient of a step, before clipping unless the output is marked as clipped.

        The weights must be unchanged afterwards. New values of entries of `state` belong into the output.
        """
        return StepOutput(*backprop.gradient(step.main))

    def finish(self, factors: Factors, state: State) -> Factors:
        """Return the adapter, or with `lora=null` the weights, to save after the last step.

        Args:
            factors: the trained weights. They must be unchanged afterwards.
            state: the state after the last step.

        Returns:
            `factors` itself, or other ones. Those of an adapter have the same alpha/r; rank and modules may differ. A
            method with an adapter of another shape declares the requirement `adapter`.
        """
        return factors


def move_anchor(method: Method, step: int, weights: Sequence[Tensor], state: State) -> tuple[State, dict[str, float]]:
    """Return the state at the start of a step, and the drift of the state that ended, if there is a switch."""
    if not method.schedule.switches_at(step):
        return state, {}
    drift = squared_distance(weights, state["anchor"]).item()
    return state | {"anchor": snapshot(weights)}, {"switch/drift": drift}
