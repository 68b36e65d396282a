"""NLSR: in modules that drifted from a safe reference adapter, its safety-critical entries are put back."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor

from lisa_lightning.data.packing import Pack
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.hooks import decoder_layers, hooked, skipped
from lisa_lightning.model.lora import modules, trainable
from lisa_lightning.repair.base import Factors, Given, Repair, Repaired, holding, observe, write
from lisa_lightning.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Realigned(Repaired):
    """The adapter, and how its modules and entries were chosen."""

    low_rank: Factors
    """The reference adapter's low-rank version, by factor."""
    masks: dict[str, Tensor]
    """The reference's safety-critical entries, by factor, bool; the control's are these in random order."""
    similarity: dict[str, float]
    """Of the masked updates of the adapter and the reference, by module, -1..1."""
    probability: dict[str, float]
    """Of being replaced, by module."""
    replaced: tuple[str, ...]
    """The modules whose masked entries are now the reference's."""


@final
class NLSR(Repair):
    """Put a safe reference's critical entries back into modules that drifted from it (Yi et al., AAAI 2025).

    1. Of each factor W of the reference, W' = V V^T W, with V the leading right singular vectors of the scores X W^T,
       X being its inputs at the answer's tokens of the alignment rows. Layers in order: a layer's inputs are those that
       the low-rank versions of all layers before it give.
    2. Critical are the entries where |W'| is above its `sparsity_ratio` quantile.
    3. A module's similarity is the cosine of the masked B A of the adapter and of the reference.
    4. Modules are ranked by it, and replaced with probabilities that rise evenly from `prune_rate` - `epsilon` for the
       most similar to `prune_rate` + `epsilon` for the least.
    5. In a replaced module critical entries of A and B become the reference's.

    Beside the reference's trainings two forward passes over the alignment rows, each layer being passed once with the
    reference's factors and once with their low-rank versions. Kept are the rows' hidden states after one layer,
    padding with them, and of a layer's modules r numbers a token, since X W^T of B is that of A times B^T.

    Departures of the official code: its singular vectors are randomised, inexact by up to 6e-2 where the spectrum has
    no gap, here they are exact; where the quantile is 0 it draws entries at random, here only nonzero ones are
    critical; and `most_similar_first`. Its reference is an extrapolation that leaves the supervised adapter out; here
    the reference is given.

    Args:
        sparsity_ratio: share of ranks that W' keeps, int(min(rows, columns) * sparsity_ratio), and share of entries
            that are not critical, above 0, below 1; the official code's is 0.8.
        prune_rate: mean probability of being replaced, 0..1; the official code's is 0.5.
        epsilon: the probabilities' half width, >= 0 (they are cut at 0 and 1); the official code's is 0.2.
        seed: of the draws; the official one is 42, which gives its draws.
        most_similar_first: give the most similar module the highest probability, as the official code does against its
            own comment.
        random: the control: as many modules, drawn at random, and in each factor as many entries, drawn at random.
    """

    needs = frozenset({"defender rows", "stacked adapters"})

    def __init__(
        self,
        sparsity_ratio: float,
        prune_rate: float,
        epsilon: float,
        seed: int,
        most_similar_first: bool = False,
        random: bool = False,
    ) -> None:
        self.sparsity_ratio = sparsity_ratio
        self.prune_rate = prune_rate
        self.epsilon = epsilon
        self.seed = seed
        self.most_similar_first = most_similar_first
        self.random = random

    def refuse(self, net: Any, deltas: Mapping[str, Delta]) -> None:
        """Raises UserError where the net has no layers to go through, or no rank would be kept."""
        decoder_layers(net)
        smallest = min(min(w.shape) for w in trainable(net).values())
        if int(smallest * self.sparsity_ratio) == 0:
            raise UserError(
                f"repair.sparsity_ratio={self.sparsity_ratio} keeps no rank of factors that have {smallest}, so "
                f"nothing would be critical; {math.ceil(1e4 / smallest) / 1e4:g} or more would"
            )

    def repair(self, given: Given) -> Realigned:
        """Uses the net, the alignment rows as alignment rows, and the reference.

        Raises:
            UserError: there is no alignment row, or the reference's factors have other names or shapes.
        """
        net = given.net()
        factors, reference = (_in_order(net, f) for f in (given.factors, given.reference()))
        _refuse_another_shape(factors, reference)
        low_rank = self._low_rank(net, reference, list(given.rows("alignment")))
        masks = {name: self._critical(w) for name, w in low_rank.items()}
        similarity = {
            module: _similarity([f[name] * masks[name] for f in (factors, reference) for name in pair])
            for module, pair in modules(factors).items()
        }
        probability = self._probability(torch.tensor(list(similarity.values())))
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.bernoulli(probability, generator=generator).bool()
        if self.random:
            drawn = drawn[torch.randperm(len(drawn), generator=generator)]
            masks = {name: _shuffled(mask, generator) for name, mask in masks.items()}
        replaced = tuple(module for module, yes in zip(similarity, drawn.tolist(), strict=True) if yes)
        return Realigned(
            _replace(factors, reference, masks, replaced),
            low_rank,
            masks,
            similarity,
            dict(zip(similarity, probability.tolist(), strict=True)),
            replaced,
        )

    def _low_rank(self, net: Any, reference: Factors, rows: list[Pack]) -> Factors:
        if not rows:
            raise UserError("nlsr needs alignment rows, and there are none")
        way = _Way(net, rows)
        found: Factors = {}
        with holding(net, reference) as weights:
            for layer, own in groupby(modules(reference).values(), key=lambda pair: way.place.get(pair[0])):
                pairs = dict(own)
                latent = way.latent(layer, list(pairs.values()))
                for a, b in pairs.items():
                    found |= self._truncate(reference, a, b, latent[b].to(reference[a].device))
                write(weights, {name: found[name] for pair in pairs.items() for name in pair})
        return found

    def _truncate(self, reference: Factors, a: str, b: str, latent: Tensor) -> Factors:
        """V V^T W of A and B, from the scores X A^T, [tokens, r], which are B's inputs too."""
        # Scores of B are latent @ B^T = (latent @ upper^T) @ basis^T: r columns tell their singular vectors.
        basis, upper = torch.linalg.qr(reference[b].float())
        v_a = self._leading(latent, reference[a].shape)
        v_b = basis @ self._leading(latent @ upper.T, reference[b].shape)
        return {
            name: (v @ (v.T @ reference[name].float())).to(reference[name].dtype) for name, v in ((a, v_a), (b, v_b))
        }

    def _leading(self, scores: Tensor, shape: torch.Size) -> Tensor:
        """Right singular vectors as columns; no more than there are tokens."""
        right = torch.linalg.svd(scores, full_matrices=False).Vh
        return right[: int(min(shape) * self.sparsity_ratio)].T

    def _critical(self, w: Tensor) -> Tensor:
        size = w.abs()
        ordered = size.flatten().sort().values
        return size > ordered[min(int(len(ordered) * self.sparsity_ratio), len(ordered) - 1)]

    def _probability(self, similarity: Tensor) -> Tensor:
        """[modules], of [modules]."""
        order = similarity.argsort(descending=not self.most_similar_first, stable=True)
        # One module alone is neither the most nor the least similar; officially it is 0/0.
        rank = order.argsort() / (len(order) - 1) if len(order) > 1 else torch.tensor([0.5])
        return (self.prune_rate - self.epsilon + rank * 2 * self.epsilon).clamp(0, 1)


class _Way:
    """The alignment rows on their way through the layers, each of which they pass when it is what it will be."""

    def __init__(self, net: Any, rows: Sequence[Pack]) -> None:
        self._net = net
        self._rows = [packed.to(next(net.parameters()).device) for packed in rows]
        self._layers = decoder_layers(net)
        layer = {id(w): i for i, module in enumerate(self._layers) for w in module.parameters()}
        self.place = {name: layer[id(w)] for name, w in net.named_parameters() if id(w) in layer}
        """Parameter -> its layer; none for those outside."""
        self._passed = 0  # layers
        self._behind: list[Any] = [None] * len(rows)  # what the last of them gives

    def latent(self, layer: int | None, names: Sequence[str]) -> dict[str, Tensor]:
        """The inputs of these factors of a layer at the answers' tokens, [tokens, r] float32; the rows go up to it."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        passed = self._layers[: self._passed]
        last = [] if layer is None else self._layers[max(0, layer - 1) : layer]
        for i, packed in enumerate(self._rows):
            answer = packed.predictors + 1  # not the token that predicts: the activations of the answer itself

            def add(name: str, x: Tensor, answer: Tensor = answer) -> None:
                found[name].append(x[answer].float())

            def keep(_: int, out: Any, i: int = i) -> None:
                self._behind[i] = out

            with skipped(passed, self._behind[i]), hooked(last, keep):
                observe(self._net, names, packed, add, masked=True)
        self._passed = layer or self._passed
        return {name: torch.cat(parts) for name, parts in found.items()}


def _in_order(net: Any, factors: Factors) -> Factors:
    """The factors layer by layer: a file's order has layer 10 before layer 2."""
    place = {name: i for i, (name, _) in enumerate(net.named_parameters())}
    return dict(sorted(factors.items(), key=lambda item: place.get(item[0], -1)))


def _refuse_another_shape(factors: Factors, reference: Factors) -> None:
    own, other = ({name: tuple(w.shape) for name, w in f.items()} for f in (factors, reference))
    differing = sorted(own.items() ^ other.items())
    if differing:
        name, shape = differing[0]
        raise UserError(f"nlsr's reference must be an adapter like the repaired one; only one has {name} {shape}")


def _similarity(factors: Iterable[Tensor]) -> float:
    """cos(B A, D C) of A, B, C, D as flattened matrices, through r x r products; 0 where either is 0."""
    a, b, c, d = (w.double() for w in factors)  # double, since products of Gram matrices lose half of the digits

    def inner(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return ((b.T @ d) * (a @ c.T)).sum()

    size = (inner(a, b, a, b) * inner(c, d, c, d)).clamp(min=0).sqrt()
    return (inner(a, b, c, d) / size).item() if size > 0 else 0.0


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    return mask.flatten()[torch.randperm(mask.numel(), generator=generator).to(mask.device)].view_as(mask)


def _replace(factors: Factors, reference: Factors, masks: Mapping[str, Tensor], replaced: tuple[str, ...]) -> Factors:
    found = dict(factors)
    for module, pair in modules(factors).items():
        if module in replaced:
            found |= {name: torch.where(masks[name], reference[name].to(factors[name]), factors[name]) for name in pair}
    return found
