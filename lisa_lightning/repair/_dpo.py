"""DPO: the refusal of a request is to become likelier than the harmful answer to it."""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from lisa_lightning.data.interleave import Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Draw, Schedule, Stream
from lisa_lightning.method.base import Method
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.loss import row_losses


@final
class DPO(Method):
    """Direct preference optimization (Rafailov et al., NeurIPS 2023, Eq. 7), for the reference adapter of NLSR.

    Row i of the streams `alignment` and `defender` are the preferred and the other answer to one request
    (`paired`). The policy that it is held to is the one at the start. Two forward passes over both streams
    and one backward.

    Args:
        beta: strength of that hold, > 0; 0.1 in NLSR.
    """

    needs = frozenset({"defender rows"})
    paired = True

    def __init__(self, beta: float) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
        self.beta = beta

    def draws(self, step: int) -> dict[Stream, Draw]:
        """Both streams."""
        return {"alignment": Draw(step), "defender": Draw(step)}

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of -log sigmoid(beta * (preferred's gain - the other's gain)), the mean over the pairs."""
        others = iter([packs for packs in step.batches["defender"].micro_batches if packs])
        first = [(p.places == 0).sum() for packs in step.main.micro_batches for p in packs]
        own = torch.tensor([float(sum(first))], device=passes.device)
        pairs = passes.summed([own])[0].item()

        def share(packs: Sequence[Pack]) -> Tensor:
            both = packs, next(others)
            with passes.aside(), passes.at(self.anchor):
                held = [row_losses(passes.model, side)[0] for side in both]
            preferred, other = (h - row_losses(passes.model, side)[0] for side, h in zip(both, held, strict=True))
            return -F.logsigmoid(self.beta * (preferred - other)).sum() / pairs

        loss, gradient = passes.gradient(step.main, share)
        return Descent(loss, gradient)
