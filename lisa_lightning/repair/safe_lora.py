"""Safe LoRA: projection of the modules whose update points away from the alignment update."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Any, Literal, final

import torch.nn.functional as F
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Cosine, CountOrZero, Seed
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.model.alignment_delta import Delta, compress, matching_deltas
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.repair.base import Repair, RepairInputs, RepairResult, draw_modules
from lisa_lightning.runtime.errors import UserError


@plain_dataclass(frozen=True, slots=True)
class Projected(RepairResult):
    """The projected adapter, with the selection of its modules."""

    cosines: dict[str, float]
    """cos(C B A, B A) by module, 0..1, before the repair."""
    projected: tuple[str, ...]
    """Modules whose B is now C B."""


@final
@dataclass(frozen=True, config=STRICT)
class SafeLoRA(Repair):
    """B <- C B in modules where cos(C B A, B A) is low (Hsu et al., NeurIPS 2024), C = V V^T / ||V||_F.

    V is the alignment update of the module (`alignment_delta.Delta`). C is no projector, so a projected update also
    changes its size. Modules that alignment did not change have no C and stay unchanged. (T-Vaccine trains a few
    modules at a time.)

    No forward pass: a few products of d_out x r matrices per module.

    Departures from the official code:
        - Exactly `number` modules are projected, of equal cosines the first. With `rounded` the official choice is
          followed.
        - Matrices are paired by name. The official code pairs them by position.
        - The official first pass of mode `number`, at a threshold of 0.3, is left out, since it has no effect.
    """

    mode: Literal["number", "threshold"] = "number"
    """`number` projects the `number` modules of lowest cosine, `threshold` those with a cosine of at most `threshold`.
    The official default is `number`."""
    number: CountOrZero = 10
    """Number of modules to project. The official default is 10."""
    threshold: Cosine = 0.5
    """Largest cosine of a projected module; -1 projects none. The official default is 0.5."""
    rounded: bool = False
    """Select by cosines of five decimals, as the official code does. There mode `number` projects all modules up to the
    number-th lowest cosine, which are more than `number` if cosines are equal."""
    random: bool = False
    """Project as many modules, drawn at random: the control."""
    seed: Seed = 0
    """Seed of that draw."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Alignment update of the adapted modules."""
        return frozenset({"alignment_update"})

    def check(self, net: Any, deltas: Mapping[str, Delta]) -> None:
        """Raise UserError if alignment will change none of the adapted modules, or fewer than `number`."""
        self._changed_modules(trainable(net), deltas)

    def repair(self, inputs: RepairInputs) -> Projected:
        """Return the projected adapter, from the alignment updates.

        Raises:
            UserError: as in `check`, since alignment may have changed fewer modules than expected.
        """
        pairs = modules(inputs.factors)
        deltas = self._changed_modules(inputs.factors, inputs.deltas())
        cosines = {module: cosine(inputs.factors, *pairs[module], delta) for module, delta in deltas.items()}
        projected = self._select(cosines)
        return Projected(project(inputs.factors, deltas, projected), cosines, projected)

    def _changed_modules(self, factors: Iterable[str], deltas: Mapping[str, Delta]) -> dict[str, Delta]:
        """Return the alignment updates of the adapted modules."""
        matching = matching_deltas(deltas, modules(factors))
        if self.mode == "number" and self.number > len(matching):
            raise UserError(
                f"repair.number={self.number}: alignment changed only {len(matching)} of the adapter's modules. "
                f"Fix: repair.number={len(matching)} or less"
            )
        return matching

    def _select(self, cosines: Mapping[str, float]) -> tuple[str, ...]:
        """Return the modules to project, in the order of `cosines`."""
        compared = {module: round(value, 5) if self.rounded else value for module, value in cosines.items()}
        # The sort is stable: of equal cosines the first are selected.
        selected = sorted(compared, key=compared.__getitem__)[: self.number]
        if self.mode == "threshold":
            selected = [module for module, value in compared.items() if value <= self.threshold]
        elif self.rounded and selected:
            selected = [module for module, value in compared.items() if value <= compared[selected[-1]]]
        if self.random:
            selected = draw_modules(cosines, len(selected), self.seed)
        return tuple(module for module in cosines if module in selected)


def cosine(factors: Factors, a: str, b: str, delta: Delta) -> float:
    """Return cos(C B A, B A) as flattened matrices, or 0 if B A is 0.

    Args:
        factors: the adapter.
        a: name of the module's A in `factors`.
        b: name of the module's B in `factors`.
        delta: the module's alignment update.
    """
    update = compress(factors[b], factors[a])
    return F.cosine_similarity(delta.project(update).flatten(), update.flatten(), dim=0).item()


def project(factors: Factors, deltas: Mapping[str, Delta], selected: tuple[str, ...]) -> Factors:
    """Return the adapter with C B instead of B in the selected modules, in the precision of B."""
    projected = dict(factors)
    for module, (_, b) in modules(factors).items():
        if module in selected:
            projected[b] = deltas[module].project(factors[b].float()).to(factors[b].dtype)
    return projected
