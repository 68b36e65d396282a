"""SPPFT (Safety Layers): plain fine-tuning in which a contiguous block of middle layers does not train."""

from typing import Final, final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Count, CountOrZero
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.runtime.errors import UserError

OFFICIAL_LAYERS: Final = 32
"""Layers of the model to which the official `begin` and `end` belong."""
OFFICIAL_BEGIN: Final = 4
OFFICIAL_END: Final = 15


@final
@dataclass(frozen=True, config=STRICT)
class SPPFT(Method):
    """Fine-tune all layers but the safety layers, begin < layer < end (Li et al., ICLR 2025). Layers count from 0.

    Weights in the safety layers get no gradient. AdamW neither moves nor decays them, and they have no share in the
    clipped norm. They still add their part to the forward pass. One forward and one backward pass a step; the backward
    pass computes no gradient of frozen weights. The memory is no more than SFT's.

    The safety layers of a model must be located first, which the paper does by scaling layers. By default they are
    those of the official script, at the same relative depth: layers 5 to 14 of 32, and 5 to 13 of 30.

    Departures from the official code:
        - Norms of the safety layers are frozen too. The official code trains them, and all weights of other layers, as
          `lora=null` does here.
        - The loss is on answers. The official code has it on prompts too.
        - Layers are found by structure, under any name. The official code looks for parameters named model.layers.N.
        - A range without a layer is rejected. The official code freezes nothing then, without a message.
    """

    begin: CountOrZero | None = None
    """Layer before the first frozen one, from 0. null is 4/32 of the depth. The official script has 4, of 32 layers."""
    end: Count | None = None
    """Layer after the last frozen one, up to the number of layers. null is 15/32 of the depth, so that at least one
    layer is frozen. The official script has 15, of 32 layers."""

    def init(self, backprop: Backprop) -> State:
        """Return the state.

        Raises:
            UserError: if the range contains no layer of the model, or the weights are all in it or all outside.
        """
        trains = self._trains(backprop)
        if all(trains) or not any(trains):
            frozen = self.frozen_layers(len(backprop.layers))
            problem = "no adapter is in" if all(trains) else "all adapters are in"
            raise UserError(
                f"lora.targets: {problem} the layers {frozen[0]} to {frozen[-1]}, which method=sppft freezes. "
                "Fix: choose targets in frozen layers and in others, or other method.begin and method.end"
            )
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the loss; None for the weights of frozen layers."""
        trains = self._trains(backprop)
        weights = [w for w, is_trained in zip(backprop.weights, trains, strict=True) if is_trained]
        loss, gradients = backprop.gradient(step.main, weights=weights)
        remaining = iter(gradients)
        return StepOutput(loss, [next(remaining) if is_trained else None for is_trained in trains])

    def frozen_layers(self, layers: int) -> range:
        """Return the indices of the frozen layers.

        Args:
            layers: number of layers of the model.

        Raises:
            UserError: if there are none, or `end` is beyond the model.
        """
        begin = round(layers * OFFICIAL_BEGIN / OFFICIAL_LAYERS) if self.begin is None else self.begin
        end = max(round(layers * OFFICIAL_END / OFFICIAL_LAYERS), begin + 2) if self.end is None else self.end
        if begin + 2 > layers:
            raise UserError(
                f"method.begin={begin}: no layer comes after it that could be frozen; the model has {layers}, from 0. "
                f"Fix: method.begin={max(0, layers - 2)} or less"
            )
        if begin + 2 > end:
            raise UserError(
                f"method.end={end}: no layer is between method.begin={begin} and it, so that none would be frozen. "
                f"Fix: method.end={begin + 2} or more"
            )
        if end > layers:
            raise UserError(f"method.end={end}: the model has {layers} layers. Fix: method.end={layers} or less")
        return range(begin + 1, end)

    def _trains(self, backprop: Backprop) -> list[bool]:
        """Return for each trainable weight whether it has a gradient."""
        frozen = self.frozen_layers(len(backprop.layers))
        return [layer not in frozen for layer in backprop.layer_of]
