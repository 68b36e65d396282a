"""Task arithmetic: add the alignment update to the fine-tuned model again."""

from collections.abc import Mapping
from typing import Any, Literal, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, NonNegative, Seed, ShareBelowOne
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import Factors, modules, stack
from lisa_lightning.repair.base import Repair, RepairInputs, RepairResult, refuse_embeddings


@final
@dataclass(frozen=True, config=STRICT)
class TaskArithmetic(Repair):
    """Add the alignment update to the fine-tuned weights (RESTA, Bhardwaj et al., ACL 2024).

        W = W_finetuned + coef * V,    V = W_aligned - W_base

    V is of low rank. So is the sum with the fine-tuned adapter's update D: its rank is that of both adapters together
    (`stack`), and its modules are those of both.

    DARE (Yu et al., ICML 2024) first thins D or V: each entry is dropped with probability `drop_rate`, and the others
    are divided by 1 - `drop_rate`. Only the entries of B are thinned, since a thinned product is not of low rank. The
    expected update stays the same. For A = 1, where B is the full matrix, this is DARE itself.

    No forward pass: the factors are concatenated. Memory: both adapters and their sum.

    Departures from the official code:
        - RESTA's code is not available. The sum and DARE are those of DARE's code (MergeLM).
        - MergeLM thins full matrices, and adds what alignment changed in norms and embeddings. An alignment adapter
          changes only its modules.
    """

    coef: NonNegative = 1.0
    """Factor of the alignment update; 0 adds nothing. MergeLM has 1."""
    drop_rate: ShareBelowOne = 0.0
    """Share of entries that DARE drops; 0 for no DARE. The paper has 0.3, as others quote it."""
    thinned: Literal["finetuned", "alignment"] = "finetuned"
    """Update that DARE thins: that of the `finetuned` adapter, presumably as in RESTA, or the `alignment` update."""
    random: bool = False
    """Shuffle the rows of each V, which keeps its singular values: the control."""
    seed: Seed = 0
    """Seed of the draws."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Alignment update as an adapter, whose factors are added."""
        return frozenset({"alignment_update", "alignment_adapter"})

    def check(self, net: Any, deltas: Mapping[str, Delta]) -> None:
        """Raise UserError if an embedding has an adapter."""
        refuse_embeddings(net, "repair=task_arithmetic")

    def repair(self, inputs: RepairInputs) -> RepairResult:
        """Return the sum of the fine-tuned adapter and the scaled alignment adapter."""
        generator = torch.Generator().manual_seed(self.seed)
        finetuned, alignment = inputs.factors, inputs.alignment()
        if self.random:
            alignment = alignment | {
                b: alignment[b][torch.randperm(len(alignment[b]), generator=generator).to(alignment[b].device)]
                for b in _names_of_b(alignment)
            }
        if self.drop_rate and self.thinned == "finetuned":
            finetuned = self._thin(finetuned, generator)
        elif self.drop_rate:
            alignment = self._thin(alignment, generator)
        if self.coef == 0:
            return RepairResult(finetuned)
        return RepairResult(stack(finetuned, alignment | {b: self.coef * alignment[b] for b in _names_of_b(alignment)}))

    def _thin(self, factors: Factors, generator: torch.Generator) -> Factors:
        """Return the adapter with dropped and rescaled entries of B."""
        thinned = {
            b: factors[b] * self._draw(b, factors[b], generator).to(factors[b]) / (1 - self.drop_rate)
            for b in _names_of_b(factors)
        }
        return factors | thinned

    def _draw(self, name: str, b: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mask of the entries of B that remain."""
        return torch.rand(b.shape, generator=generator) >= self.drop_rate


def _names_of_b(factors: Factors) -> list[str]:
    """Return the names of all B, sorted so that draws do not depend on the order of the factors."""
    return sorted(b for _, b in modules(factors).values())
