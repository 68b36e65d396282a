"""Safe LoRA: modules whose update points away from what aligning changed are turned towards it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
import torch.nn.functional as F

from lisa_lightning.model.alignment_delta import Delta, changed, compressed
from lisa_lightning.model.lora import modules, trainable
from lisa_lightning.repair.base import Factors, Given, Repair, Repaired
from lisa_lightning.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Projected(Repaired):
    """The adapter, and how its modules were chosen."""

    cosines: dict[str, float]
    """cos(C B A, B A) by module, 0..1, before the repair."""
    projected: tuple[str, ...]
    """The modules whose B is now C B."""


@final
class SafeLoRA(Repair):
    """B <- C B in modules where cos(C B A, B A) is low (Hsu et al., NeurIPS 2024), C = V V^T / ||V||_F.

    V is what aligning changed in the module (`alignment_delta.Delta`). C is no projector, so a projected update also
    changes its size. Modules that aligning left as they were (T-Vaccine trains a few at a time) have no C and stay as
    they are. No pass through the net: a few products of d_out x r matrices a module.

    Departures of the official code: `rounded`, without which exactly `number` modules are projected, of equal cosines
    the first. (Its first pass of that mode, at a threshold of 0.3, leaves no trace.) It pairs matrices by position,
    here by name.

    Args:
        mode: `number` (the official default) projects the `number` modules of lowest cosine, `threshold` those whose
            cosine is at most `threshold`.
        number: modules, 0 or more; the official default is 10.
        threshold: of the cosine; the official default is 0.5, and -1 projects none.
        rounded: choose by cosines of five decimals, as the official code does, where number projects those up to the
            number-th lowest, more than `number` where they are equal.
        random: the control: project as many modules, drawn at random.
        seed: determines that draw.
    """

    needs = frozenset({"aligned change"})

    def __init__(
        self,
        mode: Literal["number", "threshold"],
        number: int,
        threshold: float,
        rounded: bool = False,
        random: bool = False,
        seed: int = 0,
    ) -> None:
        self.mode = mode
        self.number = number
        self.threshold = threshold
        self.rounded = rounded
        self.random = random
        self.seed = seed

    def refuse(self, net: Any, deltas: Mapping[str, Delta]) -> None:
        """Raises UserError where aligning changes none of the adapted modules, or fewer than `number`."""
        self._changed(trainable(net), deltas)

    def _changed(self, factors: Iterable[str], deltas: Mapping[str, Delta]) -> dict[str, Delta]:
        found = changed(deltas, modules(factors))
        if self.mode == "number" and self.number > len(found):
            raise UserError(
                f"repair.number={self.number} is too many: aligning changed {len(found)} of the adapter's modules"
            )
        return found

    def repair(self, given: Given) -> Projected:
        """Uses the deltas. Raises UserError like `refuse`, since aligning may have changed less than it could."""
        pairs = modules(given.factors)
        deltas = self._changed(given.factors, given.deltas())
        cosines = {module: cosine(given.factors, *pairs[module], delta) for module, delta in deltas.items()}
        projected = self._chosen(cosines)
        return Projected(project(given.factors, deltas, projected), cosines, projected)

    def _chosen(self, cosines: Mapping[str, float]) -> tuple[str, ...]:
        compared = {module: round(value, 5) if self.rounded else value for module, value in cosines.items()}
        chosen = sorted(compared, key=compared.__getitem__)[: self.number]  # stable: of equal cosines the first
        if self.mode == "threshold":
            chosen = [module for module, value in compared.items() if value <= self.threshold]
        elif self.rounded and chosen:
            chosen = [module for module, value in compared.items() if value <= compared[chosen[-1]]]
        if self.random:
            drawn = torch.randperm(len(cosines), generator=torch.Generator().manual_seed(self.seed))
            chosen = [sorted(cosines)[i] for i in drawn[: len(chosen)].tolist()]
        return tuple(module for module in cosines if module in chosen)


def cosine(factors: Factors, a: str, b: str, delta: Delta) -> float:
    """cos(C B A, B A) as flattened matrices; 0 where B A is 0."""
    update = compressed(factors[b], factors[a])
    return F.cosine_similarity(delta.project(update).flatten(), update.flatten(), dim=0).item()


def project(factors: Factors, deltas: Mapping[str, Delta], chosen: tuple[str, ...]) -> Factors:
    """The adapter with C B in place of the B of the chosen modules, in B's own precision."""
    found = dict(factors)
    for module, (_, b) in modules(factors).items():
        if module in chosen:
            found[b] = deltas[module].project(factors[b].float()).to(factors[b].dtype)
    return found
