"""SafeMERGE: merging with a safe adapter in the modules whose update points away from the alignment update."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass as plain_dataclass
from math import sqrt
from typing import Any, Literal, final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Cosine, NonNegative, Seed
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.model.alignment_delta import Delta, matching_deltas
from lisa_lightning.model.factors import Factors, modules, stack, trainable
from lisa_lightning.repair.base import Repair, RepairInputs, RepairResult, draw_modules, refuse_embeddings
from lisa_lightning.repair.safe_lora import cosine


@plain_dataclass(frozen=True, slots=True)
class Merged(RepairResult):
    """The merged adapter, with the selection of its modules."""

    cosines: dict[str, float]
    """cos(C B A, B A) by module, 0..1, before the repair."""
    merged: tuple[str, ...]
    """Modules that were merged with the safe adapter's."""


@final
@dataclass(frozen=True, config=STRICT)
class SafeMerge(Repair):
    """Merge modules of low cos(C B A, B A) with those of a safe adapter (Djuhera et al., 2025), C = V V^T / ||V||_F.

    C and the cosine are Safe LoRA's (`alignment_delta.Delta`). In modules with a cosine below `threshold` the update is

        finetuned_weight * B A + safe_weight * B_safe A_safe

    and the others stay unchanged. The safe adapter is trained first, on the alignment rows (`repair.reference`). The
    merged adapter has twice the rank. A module that alignment left unchanged has C = 0 and cosine 0.

    Cost: the training of the safe adapter, and a few products of d_out x r matrices per module. No forward pass.
    Memory: both adapters and the merged one.

    Departures from the official code:
        - Updates are merged. The official code merges factors; see `merge`.
        - The other modules keep their factors. The official code rescales them, with equal updates.
        - Matrices are paired by name. The official code pairs them by position.
        - The official merge type `dare_linear`, which drops entries at random, is left out.
    """

    threshold: Cosine = 0.35
    """Modules with a cosine below it are merged; -1 merges none. The official default is 0.35."""
    finetuned_weight: NonNegative = 0.8
    """Weight of the fine-tuned adapter in merged modules. The official default is 0.8."""
    safe_weight: NonNegative = 0.2
    """Weight of the safe adapter in merged modules. The official default is 0.2."""
    merge: Literal["deltas", "factors"] = "deltas"
    """`deltas` merges updates. `factors` sums A and B, each times the root of its weight, as the official code does. So
    the rank stays, and cross terms of both adapters are added."""
    rounded: bool = False
    """Select by cosines of five decimals, as the official code does."""
    random: bool = False
    """Merge as many modules, drawn at random: the control."""
    seed: Seed = 0
    """Seed of that draw."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Alignment update of the adapted modules."""
        return frozenset({"alignment_update"})

    def check(self, net: Any, deltas: Mapping[str, Delta]) -> None:
        """Raise UserError if alignment will change no adapted module, or an embedding's adapter gets another rank."""
        matching_deltas(deltas, modules(trainable(net)))
        if self.merge == "deltas":
            refuse_embeddings(net, "repair=safe_merge")

    def repair(self, inputs: RepairInputs) -> Merged:
        """Return the merged adapter, from the alignment updates and the safe adapter.

        Raises:
            UserError: if alignment changed none of the adapted modules.
        """
        factors, pairs = inputs.factors, modules(inputs.factors)
        deltas = matching_deltas(inputs.deltas(), pairs)
        cosines = {m: cosine(factors, *pair, deltas[m]) if m in deltas else 0.0 for m, pair in pairs.items()}
        merged = self._select(cosines)
        if not merged:
            return Merged(factors, cosines, merged)
        merge = merge_factors if self.merge == "factors" else merge_deltas
        repaired = merge(factors, inputs.reference(), merged, self.finetuned_weight, self.safe_weight)
        return Merged(repaired, cosines, merged)

    def _select(self, cosines: Mapping[str, float]) -> tuple[str, ...]:
        """Return the modules to merge, in the order of `cosines`."""
        compared = {module: round(value, 5) if self.rounded else value for module, value in cosines.items()}
        selected = [module for module, value in compared.items() if value < self.threshold]
        if self.random:
            selected = draw_modules(cosines, len(selected), self.seed)
        return tuple(module for module in cosines if module in selected)


def merge_deltas(
    factors: Factors, safe: Factors, merged: Iterable[str], finetuned_weight: float, safe_weight: float
) -> Factors:
    """Return the adapter with the weighted sum of both updates in the modules `merged`, of the sum of both ranks.

    Args:
        factors: the fine-tuned adapter.
        safe: the safe adapter, with the same modules and alpha/r.
        merged: modules to merge.
        finetuned_weight: weight of the fine-tuned update.
        safe_weight: weight of the safe update.
    """
    pairs = [modules(factors)[module] for module in merged]
    weighted = factors | {b: finetuned_weight * factors[b] for _, b in pairs}
    return stack(weighted, {a: safe[a] for a, _ in pairs} | {b: safe_weight * safe[b] for _, b in pairs})


def merge_factors(
    factors: Factors, safe: Factors, merged: Iterable[str], finetuned_weight: float, safe_weight: float
) -> Factors:
    """Return the adapter with sums of factors in the modules `merged`, each times the root of its weight.

    Args:
        factors: the fine-tuned adapter.
        safe: the safe adapter, with the same shapes and alpha/r.
        merged: modules to merge.
        finetuned_weight: weight of the fine-tuned adapter.
        safe_weight: weight of the safe adapter.
    """
    names = [name for module in merged for name in modules(factors)[module]]
    return factors | {name: sqrt(finetuned_weight) * factors[name] + sqrt(safe_weight) * safe[name] for name in names}
