"""NLSR: restoring a safe reference adapter's critical entries in the modules that drifted from it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass as plain_dataclass
from itertools import groupby
from typing import Any, final

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.config.fields import STRICT, OpenShare, Seed, Share
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.packing import Pack
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factor_inputs import LayerwiseInputs, set_factors, swapped_factors
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.hooks import decoder_layers
from lisa_lightning.repair.base import Repair, RepairInputs, RepairResult
from lisa_lightning.runtime.errors import UserError


@plain_dataclass(frozen=True, slots=True)
class Realigned(RepairResult):
    """The repaired adapter, with the selection of its modules and entries."""

    low_rank: Factors
    """The reference adapter's low-rank version, by factor."""
    masks: dict[str, Tensor]
    """Safety-critical entries of the reference, bool by factor; in the control these in random order."""
    similarity: dict[str, float]
    """Cosine of the masked updates of adapter and reference, by module, -1..1."""
    probability: dict[str, float]
    """Probability of replacement, by module."""
    replaced: tuple[str, ...]
    """Modules whose masked entries are now the reference's."""


@final
@dataclass(frozen=True, config=STRICT)
class NLSR(Repair):
    """Restore a safe reference's critical entries in modules that drifted from it (Yi et al., AAAI 2025).

    1. Each factor W of the reference gets a low-rank version

           W' = V V^T W

       where V has the leading right singular vectors of the scores X W^T. X are the inputs of W at the answer tokens of
       the alignment rows. Layers are processed in order: the inputs of a layer come from the low-rank versions of all
       earlier layers.
    2. Entries are critical where |W'| is above its `sparsity_ratio` quantile.
    3. The similarity of a module is the cosine of the masked B A of the adapter and of the reference.
    4. Modules are ranked by similarity. Their probabilities of replacement rise evenly from `prune_rate` - `epsilon`
       for the most similar to `prune_rate` + `epsilon` for the least similar.
    5. In a replaced module critical entries of A and B become the reference's.

    Two forward passes over the alignment rows, and the trainings of the reference. Each layer runs once with the
    reference's factors and once with their low-rank versions.

    Memory: the hidden states after one layer (padding included), and r values per token for each module of a layer. The
    scores of B are those of A times B^T, so they need no memory.

    Departures from the official code:
        - Singular vectors are exact. The official ones are randomized, inexact by up to 6e-2 where the spectrum has no
          gap.
        - Only nonzero entries are critical. Where the quantile is 0, the official code draws entries at random.
        - The least similar module has the highest probability; see `most_similar_first`.
        - The reference is an input. The official one is an extrapolation that leaves the supervised adapter out.
    """

    sparsity_ratio: OpenShare = 0.8
    """Share of ranks that W' keeps, int(min(rows, columns) * sparsity_ratio), and share of entries that are not
    critical. The official code has 0.8."""
    prune_rate: Share = 0.5
    """Mean probability of replacement. The official code has 0.5."""
    epsilon: Share = 0.2
    """Half width of the range of probabilities, which are clamped to 0..1. The official code has 0.2."""
    seed: Seed = 0
    """Seed of the draws. The official code has 42, which yields its draws."""
    most_similar_first: bool = False
    """Assign the highest probability to the most similar module, as the official code does against its comment."""
    random: bool = False
    """Replace as many modules, and in each factor as many entries, drawn at random: the control."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider, passes of the whole model, and a separate adapter on the aligned model."""
        return frozenset({"defender_rows", "stacked_adapters", "whole_model"})

    def check(self, net: Any, deltas: Mapping[str, Delta]) -> None:
        """Raise UserError if the model has no list of layers, or no rank would be kept."""
        decoder_layers(net)
        smallest = min(min(w.shape) for w in trainable(net).values())
        if int(smallest * self.sparsity_ratio) == 0:
            raise UserError(
                f"repair.sparsity_ratio={self.sparsity_ratio}: keeps 0 of the {smallest} ranks of the smallest factor. "
                f"Fix: repair.sparsity_ratio={math.ceil(1e4 / smallest) / 1e4:g} or more"
            )

    def repair(self, inputs: RepairInputs) -> Realigned:
        """Return the repaired adapter, from the model, the alignment rows and the reference.

        Raises:
            UserError: if there is no alignment row, or the reference has other names or shapes than the adapter.
        """
        net = inputs.net()
        factors, reference = (_sorted_by_layer(net, f) for f in (inputs.factors, inputs.reference()))
        _check_shapes(factors, reference)
        low_rank = self._low_rank(net, reference, list(inputs.rows("alignment")))
        masks = {name: self._critical(w) for name, w in low_rank.items()}
        similarity = {
            module: _similarity([f[name] * masks[name] for f in (factors, reference) for name in pair])
            for module, pair in modules(factors).items()
        }
        probabilities = self._probabilities(torch.tensor(list(similarity.values())))
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.bernoulli(probabilities, generator=generator).bool()
        if self.random:
            drawn = drawn[torch.randperm(len(drawn), generator=generator)]
            masks = {name: _shuffled(mask, generator) for name, mask in masks.items()}
        replaced = tuple(module for module, is_drawn in zip(similarity, drawn.tolist(), strict=True) if is_drawn)
        return Realigned(
            _replace(factors, reference, masks, replaced),
            low_rank,
            masks,
            similarity,
            dict(zip(similarity, probabilities.tolist(), strict=True)),
            replaced,
        )

    def _low_rank(self, net: Any, reference: Factors, packs: list[Pack]) -> Factors:
        """Return W' of each factor."""
        if not packs:
            raise UserError(
                "repair=nlsr: needs alignment rows, and source.alignment has none. Fix: add rows to source.alignment"
            )
        layerwise = LayerwiseInputs(net, packs)
        low_rank: Factors = {}
        with swapped_factors(net, reference) as weights:
            for layer, group in groupby(modules(reference).values(), key=lambda pair: layerwise.layer_of.get(pair[0])):
                pairs = dict(group)
                latents = layerwise.inputs(layer, list(pairs.values()))
                for a, b in pairs.items():
                    low_rank |= self._truncate(reference, a, b, latents[b].to(reference[a].device))
                set_factors(weights, {name: low_rank[name] for pair in pairs.items() for name in pair})
        return low_rank

    def _truncate(self, reference: Factors, a: str, b: str, latent: Tensor) -> Factors:
        """Return V V^T W of A and B, from the scores X A^T, [tokens, r], which are also the inputs of B."""
        # Scores of B are latent @ B^T = (latent @ upper^T) @ basis^T, so r columns determine their singular vectors.
        basis, upper = torch.linalg.qr(reference[b].float())
        v_a = self._leading(latent, reference[a].shape)
        v_b = basis @ self._leading(latent @ upper.T, reference[b].shape)
        return {
            name: (v @ (v.T @ reference[name].float())).to(reference[name].dtype) for name, v in ((a, v_a), (b, v_b))
        }

    def _leading(self, scores: Tensor, shape: torch.Size) -> Tensor:
        """Return the leading right singular vectors as columns, at most one per token."""
        right = torch.linalg.svd(scores, full_matrices=False).Vh
        return right[: int(min(shape) * self.sparsity_ratio)].T

    def _critical(self, w: Tensor) -> Tensor:
        """Return the mask of the critical entries."""
        size = w.abs()
        ordered = size.flatten().sort().values
        return size > ordered[min(int(len(ordered) * self.sparsity_ratio), len(ordered) - 1)]

    def _probabilities(self, similarity: Tensor) -> Tensor:
        """Return the probability of replacement, [modules], from the similarity, [modules]."""
        order = similarity.argsort(descending=not self.most_similar_first, stable=True)
        # A single module is neither the most nor the least similar. The official code computes 0/0 for it.
        rank = order.argsort() / (len(order) - 1) if len(order) > 1 else torch.tensor([0.5])
        return (self.prune_rate - self.epsilon + rank * 2 * self.epsilon).clamp(0, 1)


def _sorted_by_layer(net: Any, factors: Factors) -> Factors:
    """Return the factors layer by layer. In a file layer 10 precedes layer 2."""
    index = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    return dict(sorted(factors.items(), key=lambda item: index.get(item[0], -1)))


def _check_shapes(factors: Factors, reference: Factors) -> None:
    """Raise UserError if the reference has other names or shapes than the adapter."""
    shapes, reference_shapes = ({name: tuple(w.shape) for name, w in f.items()} for f in (factors, reference))
    differing = sorted(shapes.items() ^ reference_shapes.items())
    if differing:
        name, shape = differing[0]
        raise UserError(
            f"repair=nlsr: adapter and reference must have the same factors, and only one has {name} {shape}. "
            "Fix: use a reference with the targets and rank of the adapter"
        )


def _similarity(factors: Iterable[Tensor]) -> float:
    """Return cos(B A, D C) of A, B, C, D as flattened matrices, through r x r products; 0 if either is 0."""
    # In float32 products of Gram matrices lose half of the digits.
    a, b, c, d = (w.double() for w in factors)

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((b.T @ d) * (a @ c.T)).sum()

    norms = (inner(a, b, a, b) * inner(c, d, c, d)).clamp(min=0).sqrt()
    return (inner(a, b, c, d) / norms).item() if norms > 0 else 0.0


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    return mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view_as(mask)


def _replace(factors: Factors, reference: Factors, masks: Mapping[str, Tensor], replaced: tuple[str, ...]) -> Factors:
    """Return the adapter with the reference's values in the masked entries of the replaced modules."""
    repaired = dict(factors)
    for module, pair in modules(factors).items():
        if module in replaced:
            repaired |= {
                name: torch.where(masks[name], reference[name].to(factors[name]), factors[name]) for name in pair
            }
    return repaired
