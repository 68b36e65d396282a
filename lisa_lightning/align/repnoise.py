"""RepNoise: alignment that turns what the model makes of harmful rows into noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lisa_lightning.blocks import final_norm, mlp_blocks, outputs
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.loss import logits_at, unembed
from lisa_lightning.method.method import Method
from lisa_lightning.passes import Descent, Passes
from lisa_lightning.schedule import Draw, Schedule, Stream

KERNELS = 5


@dataclass(frozen=True)
class Counted:
    """What of a pack of padded rows counts."""

    mask: Tensor
    """[R, T] bool, the positions whose MLP outputs are compared with noise."""
    predictors: Tensor
    """[S] index of the position that predicts a label."""
    targets: Tensor
    """[S] the labels."""
    kept: Tensor | None
    """[S] factor of the predictor's logits: 0 where the official code zeroes them; None: nowhere."""


@final
class RepNoise(Method):
    """CE(harmless) + beta * N - alpha * log H (Rosati et al., NeurIPS 2024, Eq. 4 and 5, in the port of Booster).

    N is the mean over layers of the maximum mean discrepancy (five Gaussian kernels) between noise and what the MLP
    makes of harmful rows; H is 1 plus the cross entropy of their labels, averaged over the hidden states of all depths,
    each through the final norm and the unembedding. N and log H are of the step's rows as a whole, whatever their
    split, so harmful rows take a pass for H and, once all their activations are known, one for N: three forward passes
    and three backward, the unembedding of every depth in one of them.

    A row's label tokens are what counts. `official` is the port to the letter: what counts are the positions at which
    ids of harmful and harmless rows differ, padding included, though the rows are no pairs; logits behind other
    positions are zeroed, not left out; ids of harmful labels go through bfloat16, which rounds those above 256, and so
    do hidden states on their way into the final norm, the last one twice; n + 1 cross entropies are divided by n. Its
    masks compare rows of two micro-batches, so it wants a step's rows in one. For N to mean much a step wants several.

    Args:
        alpha: factor of log H, >= 0. The paper's is 1, that of Booster's script 0.1.
        beta: factor of N, >= 0. 0.001.
        official: see above.
        seed: of the noise.
    """

    needs = frozenset({"defender rows"})

    def __init__(self, alpha: float, beta: float, official: bool, seed: int) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
        self.alpha = alpha
        self.beta = beta
        self.official = official
        self.rows_apart = frozenset({"defender", "alignment"} if official else {"defender"})
        self.seed = seed
        self.blocks: list[nn.Module] = []
        self.norm = nn.Module()

    def draws(self, step: int) -> dict[Stream, Draw]:
        """Both streams."""
        return {"alignment": Draw(step), "defender": Draw(step)}

    def prepare(self, passes: Passes) -> None:
        """Find the blocks and the final norm."""
        self.blocks, self.norm = mlp_blocks(passes.model), final_norm(passes.model)

    def gradient(self, passes: Passes, step: Step) -> Descent:
        """Of the three terms."""
        harmless, harmful = step.main, step.batches["defender"]
        loss, gradient = self._harmless(passes, harmless, harmful)
        counted = self._counted(harmful, harmless, rounded=True)
        labels = self._labels(passes, counted)
        if labels == 0:  # every answer is cut off
            return Descent(loss, gradient)
        found: list[list[Tensor]] = []
        of_entropy = iter(counted)

        def entropies(packs: Sequence[Pack]) -> Tensor:
            features, sum_ = self._harmful(passes.model, packs[0], next(of_entropy))
            found.append([f.detach() for f in features])
            return sum_ / labels

        entropy, away = passes.gradient(harmful, entropies)
        pulls, distances, row = self._noised(passes, step.index, counted, found)
        of_noise = iter(counted)

        def pulled(packs: Sequence[Pack]) -> Tensor:
            nonlocal row
            features = self._features(passes.model, packs[0], next(of_noise))
            rows = slice(row, row + len(packs[0].ids))
            row = rows.stop
            terms = [(f * pull[rows, : f.shape[1]]).sum() for f, pull in zip(features, pulls, strict=True)]
            return torch.stack(terms).mean()

        _, towards = passes.gradient(harmful, pulled)
        mmd = torch.stack(distances).mean().item()
        parts = zip(gradient, away, towards, strict=True)
        return Descent(
            loss,
            [g - self.alpha / (1 + entropy) * a + self.beta * t for g, a, t in parts],
            {
                "repnoise/penalty": self.beta * mmd - self.alpha * math.log1p(entropy),
                "repnoise/mmd": mmd,
                "defender/loss": entropy,
            },
        )

    def _harmless(self, passes: Passes, harmless: Batch, harmful: Batch) -> tuple[float, list[Tensor]]:
        """The loss on alignment rows and its gradient."""
        if not self.official:
            return passes.gradient(harmless)
        counted = self._counted(harmless, harmful, rounded=False)
        scale = 1 / max(1.0, self._labels(passes, counted))
        places = iter(counted)

        def share(packs: Sequence[Pack]) -> Tensor:
            own = next(places)
            return _entropy(logits_at(passes.model, packs[0], own.predictors), own) * scale

        return passes.gradient(harmless, share)

    def _counted(self, batch: Batch, others: Batch, rounded: bool) -> list[Counted]:
        """For each of this rank's micro-batches."""
        if self.official:
            return [_differing(p, o, rounded) for p, o in zip(_packs(batch), _packs(others), strict=True)]
        return [_labelled(p) for p in _packs(batch)]

    def _labels(self, passes: Passes, counted: Sequence[Counted]) -> float:
        """How many labels there are in all micro-batches and ranks."""
        own = torch.tensor([float(sum(len(c.targets) for c in counted))], device=passes.device)
        return passes.summed([own])[0].item()

    def _harmful(self, model: Any, pack: Pack, counted: Counted) -> tuple[list[Tensor], Tensor]:
        """Each layer's masked MLP outputs [R, T, H], and the sum of label tokens' entropies, averaged over depths."""
        with outputs(self.blocks) as found:
            out = model(
                input_ids=pack.ids,
                attention_mask=pack.mask.long(),
                use_cache=False,
                output_hidden_states=True,
                logits_to_keep=0 if self.official else 1,  # 0: all
            )
        states = [h.flatten(0, 1)[counted.predictors] for h in out.hidden_states]  # the last is through the final norm
        if self.official:
            normed = [self.norm(h.to(torch.bfloat16)) for h in states]
        else:
            normed = [*(self.norm(h) for h in states[:-1]), states[-1]]
        entropies = [_entropy(unembed(model, h), counted) for h in normed]
        if self.official:
            entropies.append(_entropy(out.logits.flatten(0, 1)[counted.predictors], counted))
        return _masked(found, pack, counted), torch.stack(entropies).sum() / len(states)

    def _features(self, model: Any, pack: Pack, counted: Counted) -> list[Tensor]:
        """Each layer's masked MLP outputs [R, T, H] alone."""
        with outputs(self.blocks) as found:
            model(input_ids=pack.ids, attention_mask=pack.mask.long(), use_cache=False, logits_to_keep=1)
        return _masked(found, pack, counted)

    def _noised(
        self, passes: Passes, step: int, counted: Sequence[Counted], found: list[list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], int]:
        """Over all rows of the step: for each layer the MMD's gradient [R, T, H] and the MMD; this rank's first row."""
        pulls, distances = [], []
        mask, first = passes.gathered([c.mask[..., None] for c in counted], 1)
        width = passes.model.config.get_text_config().hidden_size
        for layer in range(len(self.blocks)):
            features, _ = passes.gathered([micro[layer] for micro in found], width)
            noise = self.noise(step, layer, features.shape).to(features) * mask
            with torch.enable_grad():
                own = features.requires_grad_()
                distance = mmd(own.flatten(1), noise.flatten(1))
                (pull,) = torch.autograd.grad(distance, own)
            pulls.append(pull)
            distances.append(distance.detach())
        return pulls, distances, first

    def noise(self, step: int, layer: int, shape: Sequence[int]) -> Tensor:
        """Standard normal, the same on every rank and after a resume."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_009 + layer)
        return torch.randn(*shape, generator=generator)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of samples [N, D] and [N, D], with the biased estimator.

    Gaussian kernels whose bandwidths are 1, 2, 4, 8 and 16 times a quarter of the mean squared distance.
    """
    both = torch.cat([x, y]).float()
    distances = (both[None] - both[:, None]).square().sum(-1)
    n = len(both)
    bandwidth = distances.detach().sum() / (n * n - n) / 4
    kernel = torch.stack([torch.exp(-distances / (bandwidth * 2**i)) for i in range(KERNELS)]).sum(0)
    signs = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).to(kernel)
    return (signs[:, None] * signs[None] * kernel).sum() / (len(x) * len(y))


def _masked(found: Sequence[Tensor], pack: Pack, counted: Counted) -> list[Tensor]:
    return [f.view(*pack.ids.shape, -1) * counted.mask[..., None] for f in found]


def _packs(batch: Batch) -> list[Pack]:
    return [p for packs in batch.micro_batches for p in packs]


def _labelled(pack: Pack) -> Counted:
    mask = torch.zeros_like(pack.mask).flatten()
    mask[pack.predictors + 1] = True
    return Counted(mask.view_as(pack.mask), pack.predictors, pack.targets, None)


def _differing(pack: Pack, other: Pack, rounded: bool) -> Counted:
    """The official masks: the other batch's ids are cut, or filled up by id 0, to this one's shape."""
    fitted = torch.zeros_like(pack.ids)
    rows, columns = (min(a, b) for a, b in zip(pack.ids.shape, other.ids.shape, strict=True))
    fitted[:rows, :columns] = other.ids[:rows, :columns]
    mask = pack.ids != fitted
    labels = pack.ids[:, 1:] * mask[:, 1:]
    if rounded:
        labels = labels.to(torch.bfloat16).long()
    row, column = (labels != 0).nonzero(as_tuple=True)
    return Counted(mask, row * pack.ids.shape[1] + column, labels[row, column], mask[row, column])


def _entropy(logits: Tensor, counted: Counted) -> Tensor:
    logits = logits if counted.kept is None else logits * counted.kept[:, None]
    return F.cross_entropy(logits.float(), counted.targets, reduction="sum")
