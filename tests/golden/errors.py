"""Errors of a replayed golden case, in a file of their own because `replay.py` is also run as a program."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Errors:
    """Largest errors of a replayed case, by quantity."""

    tolerance: float
    of: Mapping[str, float] = field(default_factory=dict)
    """Tolerances of single quantities, which differ from `tolerance`."""
    found: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, found: Any, wanted: Any) -> None:
        """Keep the largest error of numbers or tensors, relative to large values except for weights."""
        a, b = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
        unit = torch.ones_like(b) if name == "weights" else b.abs().clamp(min=1)
        error = ((a - b).abs() / unit).max().item() if a.shape == b.shape else float("inf")
        self._keep(name, error)

    def each(self, name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Keep the largest error of tensors by name, which is infinite if the names differ."""
        self.same(name, found.keys(), wanted.keys())
        for key, value in wanted.items():
            self.add(name, found.get(key, torch.zeros(())), value)

    def same(self, name: str, found: Any, wanted: Any) -> None:
        """Keep an infinite error if two values differ, for values that can't be nearly right."""
        self._keep(name, 0.0 if found == wanted else float("inf"))

    def _keep(self, name: str, error: float) -> None:
        before = self.found.get(name, 0.0)
        self.found[name] = before if error <= before else error  # which NaN is not

    @property
    def passed(self) -> bool:
        """Result of the comparison: true if there was anything to compare, and all of it is within the tolerance."""
        return bool(self.found) and all(e <= self.of.get(name, self.tolerance) for name, e in self.found.items())
