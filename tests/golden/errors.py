"""What a replayed golden case was off by; in a file of its own, as `replay.py` is also run as a program."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Errors:
    """What a replayed case was off by."""

    tolerance: float
    of: Mapping[str, float] = field(default_factory=dict)
    """Of single things another one."""
    found: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, found: Any, wanted: Any) -> None:
        """Keep the largest error of numbers or tensors; of all but weights relative where they are large."""
        a, b = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
        unit = torch.ones_like(b) if name == "weights" else b.abs().clamp(min=1)
        error = ((a - b).abs() / unit).max().item() if a.shape == b.shape else float("inf")
        self._keep(name, error)

    def each(self, name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Tensors by name."""
        self.same(name, found.keys(), wanted.keys())
        for key, value in wanted.items():
            self.add(name, found.get(key, torch.zeros(())), value)

    def same(self, name: str, found: Any, wanted: Any) -> None:
        """For what can't be nearly right."""
        self._keep(name, 0.0 if found == wanted else float("inf"))

    def _keep(self, name: str, error: float) -> None:
        before = self.found.get(name, 0.0)
        self.found[name] = before if error <= before else error  # which NaN is not

    @property
    def passed(self) -> bool:
        """Whether there was anything to compare, and all of it is within the tolerance."""
        return bool(self.found) and all(e <= self.of.get(name, self.tolerance) for name, e in self.found.items())
