"""Antidote: pruning of the adapter's entries that matter most for harmful rows."""

from collections.abc import Iterable
from dataclasses import dataclass as plain_dataclass
from typing import Any, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, Seed, Share
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.packing import Pack
from lisa_lightning.model.factor_inputs import capture_inputs, swapped_factors
from lisa_lightning.model.factors import Factors, modules
from lisa_lightning.repair.base import Repair, RepairInputs, RepairResult
from lisa_lightning.runtime.errors import UserError


@plain_dataclass(frozen=True, slots=True)
class Pruned(RepairResult):
    """The pruned adapter, with scores and masks."""

    scores: Factors
    """Score of every entry, by factor; random in the control."""
    masks: dict[str, Tensor]
    """[rows, columns] bool by factor, True for a pruned entry."""


@final
@dataclass(frozen=True, config=STRICT)
class Antidote(Repair):
    """Zero the entries of highest Wanda score on harmful rows (Huang et al., ICML 2025).

    The score of entry ij of a factor W (each A and each B) is

        |W_ij| * sqrt(s_j)

    where s_j is the mean over rows of the sum over tokens of the squared input x_j. In every row of W, the columns of
    highest score are pruned. Their number is

        columns - int(columns * (1 - dense_ratio))

    so at least one, and with a small rank more than dense_ratio. An entry of A or B affects a whole row or column of
    the update. So far more than dense_ratio of B A changes.

    One forward pass over the harmful rows, up to the last adapted module.
    """

    dense_ratio: Share = 0.1
    """Share of entries to prune; 0 prunes none. The official scripts have 0.1 for SST-2 and 0.05 for GSM8K."""
    pads_count: bool = False
    """Run rows without attention mask and count padding like any token, as the official code does. Its scripts run one
    row at a time, so that there is no padding."""
    random: bool = False
    """Prune as many entries of every row, drawn at random: the control. It uses neither model nor rows."""
    seed: Seed = 0
    """Seed of that draw."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider and passes of the whole model; nothing for the control."""
        return frozenset(() if self.random else {"defender_rows", "whole_model"})

    def repair(self, inputs: RepairInputs) -> Pruned:
        """Return the pruned adapter, from the model and the harmful rows.

        Raises:
            UserError: if there is no harmful row, or the model has no such adapter.
        """
        factors = inputs.factors
        names = [name for pair in modules(factors).values() for name in pair]
        if self.random:
            scores = self._random_scores({name: factors[name] for name in names})
        else:
            power = self._input_power(inputs.net(), factors, names, inputs.rows("defender"))
            scores = {name: factors[name].float().abs() * power[name].sqrt() for name in names}
        masks = {name: self._highest(score) for name, score in scores.items()}
        pruned = {name: factors[name].masked_fill(mask, 0) for name, mask in masks.items()}
        return Pruned({**factors, **pruned}, scores, masks)

    def _input_power(self, net: Any, factors: Factors, names: list[str], packs: Iterable[Pack]) -> dict[str, Tensor]:
        """Return s_j of each factor, [columns] float32, on the device of the factor."""
        power = {name: torch.zeros(factors[name].shape[1], device=factors[name].device) for name in names}
        rows = 0
        with swapped_factors(net, factors):
            for host_pack in packs:
                pack = host_pack.to(next(net.parameters()).device)
                counted = (torch.ones_like(pack.mask) if self.pads_count else pack.mask).flatten()

                def add_power(name: str, x: Tensor, counted: Tensor = counted) -> None:
                    power[name] += x[counted].float().square().sum(0).to(power[name].device)

                capture_inputs(net, names, pack, add_power, masked=not self.pads_count)
                rows += len(pack.ids)
        if not rows:
            raise UserError(
                "repair=antidote: needs defender rows, and source.defender has none. "
                "Fix: add harmful rows to source.defender"
            )
        return {name: total / rows for name, total in power.items()}

    def _random_scores(self, factors: Factors) -> Factors:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in sorted(factors.items())}

    def _highest(self, score: Tensor) -> Tensor:
        """Return the mask of the entries of highest score in each row."""
        columns = score.shape[1]
        remaining = int(columns * (1 - self.dense_ratio))
        # The sort is stable, as in the official code: of equal scores the last are pruned.
        pruned = score.sort(dim=1, stable=True).indices[:, remaining:]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, pruned, True)
