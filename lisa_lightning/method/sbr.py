"""SBR: fine-tuning with the last hidden states of a few harmful prompts tied to their values at the start."""

from collections.abc import Sequence
from itertools import accumulate
from typing import final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Count, NonNegative
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import capture_outputs
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.loss import forward
from lisa_lightning.runtime.errors import UserError


@final
@dataclass(frozen=True, config=STRICT)
class SBR(Method):
    """Add lamb * mean (h - h_ref)^2 to the loss (safety bottleneck regularization, "Safety Anchor", ICML 2026).

    h is the hidden state after the final norm at the last prompt token of an anchor. h_ref is h before the first step.
    The mean is over anchors and hidden dimensions. The anchors are the prompts of the first defender rows; the official
    code contains a few fixed prompts.

    One forward and one backward pass a step over the user's rows, and one each over the anchors' rows, answers
    included. Before the first step one forward pass over the anchors' rows. Memory: one float32 state per anchor. The
    anchors' passes have no dropout, so that h equals h_ref at the start. (The official code has no dropout at all.)

    In the official code:
        - `per_micro_batch`: the term is added in full to every micro-batch, so that its factor is lamb times their
          number. The cross-entropy is divided correctly.
        - h is read at the index of the last token of right-padded prompts. With padding on the left this is a wrong
          token, which is not reproduced.
    """

    lamb: NonNegative = 50.0
    """Factor of the penalty; 0 is SFT. The official script has 50, which its accumulation makes 200."""
    anchors: Count = 8
    """Number of defender rows whose prompts are anchors. The official script has 8; by the abstract one is enough."""
    per_micro_batch: bool = False
    """Add the penalty once per micro-batch, as the official code does."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider."""
        return frozenset({"defender_rows"})

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if the model has no final norm."""
        _ = backprop.final_norm
        return super().init(backprop)

    def start(self, backprop: Backprop, state: State) -> State:
        """Return the state with h_ref, unless a checkpoint has it.

        Raises:
            UserError: if no defender row has an answer.
        """
        return state if "reference" in state else state | {"reference": [_reference(backprop, self._rows(backprop))]}

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss plus the penalty."""
        anchors, (reference,) = self._rows(backprop), state["reference"]
        loss, gradients = backprop.gradient(step.main)
        factor = self.lamb * (len(step.main.micro_batches) if self.per_micro_batch else 1)
        with backprop.no_dropout():
            starts = _row_starts(backprop, anchors)

            def anchor_loss(packs: Sequence[Pack], index: int) -> Tensor:
                states = _last_states(backprop, packs)
                target = reference[starts[index] : starts[index] + len(states)]
                return factor / reference.numel() * (states - target).square().sum()

            penalty, anchor_gradients = backprop.gradient(anchors, anchor_loss)
        total = [user + anchor for user, anchor in zip(gradients, anchor_gradients, strict=True)]
        return StepOutput(loss, total, {"sbr/penalty": penalty})

    def _rows(self, backprop: Backprop) -> Batch:
        """Return the anchors' rows. Raises UserError if none has an answer, without which a row is left out."""
        rows = next(backprop.iter_stream("defender", self.anchors), None)
        if rows is None or not rows.tokens:
            raise UserError(
                f"method=sbr: needs defender rows with an answer, and the first {self.anchors} have none. "
                "Fix: add rows to source.defender, or set a larger data.max_length"
            )
        return rows


def _reference(backprop: Backprop, anchors: Batch) -> Tensor:
    """Return the states [anchors, H] of all ranks, in the order of the rows."""
    with torch.no_grad(), backprop.no_dropout():
        states = [_last_states(backprop, packs)[:, None] for packs in backprop.micro_batches(anchors)]
    rows, _ = backprop.all_gather_rows(states, backprop.model.config.get_text_config().hidden_size)
    return rows.flatten(0, 1).float()


def _row_starts(backprop: Backprop, anchors: Batch) -> list[int]:
    """Return the index of the first row of each micro-batch of this rank, among the rows of all ranks."""
    counts = [sum(int((p.label_index == 0).sum()) for p in packs) for packs in anchors.nonempty]
    _, first = backprop.all_gather_rows([torch.zeros(count, 1, 1) for count in counts], 1)
    return list(accumulate(counts, initial=first))


def _last_states(backprop: Backprop, packs: Sequence[Pack]) -> Tensor:
    """Return the float32 states [R, H] at the last prompt token of each row of a micro-batch, in their order."""
    states, rows = [], []
    for packed in packs:
        with capture_outputs([backprop.final_norm]) as outputs:
            forward(backprop.model, packed, 1)
        first = packed.label_index == 0
        states.append(outputs[0].flatten(0, -2)[packed.logit_positions[first]])
        rows.append(packed.row_index[first])
    return torch.cat(states)[torch.cat(rows).argsort()].float()
