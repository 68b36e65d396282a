"""Antidote: the adapter's entries that matter most for harmful rows are set to zero."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lisa_lightning.data.packing import Pack
from lisa_lightning.model.lora import modules
from lisa_lightning.repair.base import Factors, Given, Repair, Repaired, holding, observe
from lisa_lightning.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Pruned(Repaired):
    """The adapter, and how its entries were chosen."""

    scores: Factors
    """By factor, of its shape; the control's are random."""
    masks: dict[str, Tensor]
    """By factor, bool, True where the entry was removed."""


@final
class Antidote(Repair):
    """Zero the entries of highest Wanda score on harmful rows (Huang et al., ICML 2025).

    The score of entry ij of a factor W (each A and each B) is |W_ij| * sqrt(s_j), where s_j is the mean over rows of
    the sum over tokens of the squared input x_j. Of every row of W, the columns of highest score go: columns -
    int(columns * (1 - dense_ratio)), so at least one, and of a small rank more than dense_ratio. An entry of A or B
    acts on a whole row or column of the update, so far more than dense_ratio of B A changes.

    One forward pass over the harmful rows, up to the last adapted module.

    Args:
        dense_ratio: share of entries to remove, 0..1; 0 removes none. The official scripts have 0.1 for SST-2 and
            0.05 for GSM8K.
        pads_count: run rows without attention mask and count padding like any token, as the official code does. (Its
            scripts run one row at a time, where there is no padding.)
        random: the control: as many entries of every row, drawn at random; neither net nor rows are used.
        seed: determines that draw.
    """

    def __init__(self, dense_ratio: float, pads_count: bool = False, random: bool = False, seed: int = 0) -> None:
        self.dense_ratio = dense_ratio
        self.pads_count = pads_count
        self.random = random
        self.seed = seed
        self.needs = frozenset() if random else frozenset({"defender rows"})

    def repair(self, given: Given) -> Pruned:
        """Uses the net and the harmful rows.

        Raises:
            UserError: there is no harmful row, or the net has no such adapter.
        """
        factors = given.factors
        names = [name for pair in modules(factors).values() for name in pair]
        if self.random:
            scores = self._random_scores({name: factors[name] for name in names})
        else:
            power = self._input_power(given.net(), factors, names, given.rows("defender"))
            scores = {name: factors[name].float().abs() * power[name].sqrt() for name in names}
        masks = {name: self._highest(score) for name, score in scores.items()}
        pruned = {name: factors[name].masked_fill(mask, 0) for name, mask in masks.items()}
        return Pruned({**factors, **pruned}, scores, masks)

    def _input_power(self, net: Any, factors: Factors, names: list[str], rows: Iterable[Pack]) -> dict[str, Tensor]:
        """s_j of each factor: [columns] float32, where the factor is."""
        power = {name: torch.zeros(factors[name].shape[1], device=factors[name].device) for name in names}
        count = 0
        with holding(net, factors):
            for packed in rows:
                at = packed.to(next(net.parameters()).device)
                counted = (torch.ones_like(at.mask) if self.pads_count else at.mask).flatten()

                def add(name: str, x: Tensor, counted: Tensor = counted) -> None:
                    power[name] += x[counted].float().square().sum(0).to(power[name].device)

                observe(net, names, at, add, masked=not self.pads_count)
                count += len(at.ids)
        if not count:
            raise UserError("repair=antidote needs defender rows (source.defender), and there are none")
        return {name: total / count for name, total in power.items()}

    def _random_scores(self, factors: Factors) -> Factors:
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.rand(w.shape, generator=generator).to(w.device) for name, w in sorted(factors.items())}

    def _highest(self, score: Tensor) -> Tensor:
        columns = score.shape[1]
        kept = int(columns * (1 - self.dense_ratio))
        # Stable, as in the official code: of equal scores the last go.
        removed = score.sort(dim=1, stable=True).indices[:, kept:]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, removed, True)
