"""RepNoise: alignment that turns what the model makes of harmful rows into noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Draw, Schedule, Stream
from lisa_lightning.method.base import Method
from lisa_lightning.model.hooks import final_norm, mlp_blocks, outputs
from lisa_lightning.objective.backprop import Descent, Passes
from lisa_lightning.objective.loss import forward, logits_at, unembed

KERNELS = 5


@dataclass(frozen=True)
class Counted:
    """What of a pack counts."""

    states: Tensor
    """[N] index of a token whose MLP outputs are compared with noise."""
    compared: Tensor
    """[N] bool, False where the official code makes zeros of both."""
    rows: Tensor
    """[N] a number for the token's row, as in a pack."""
    columns: Tensor
    """[N] its place in the row, or in its answer."""
    predictors: Tensor
    """[S] index of the token that predicts a label."""
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

    H is about a row's labels, N about its answer's tokens but the last, place by place of the answer. `official` is the
    port to the letter: what counts are the positions at which ids of harmful and harmless rows differ, padding
    included, though the rows are no pairs; logits behind other positions are zeroed, not left out; labels with id 0 are
    none; ids of harmful labels go through bfloat16, which rounds those above 256 (one that is then behind the
    vocabulary's last is no label here, where the port breaks off), and so do hidden states on their way into the final
    norm, the last one twice; n + 1 cross entropies are divided by n. Its masks compare padded rows of two
    micro-batches, so a step's rows must not be split; they are padded with id 0, as in the recorded cases (a run of the
    port on a model without a padding token adds one, whose id counts as a label). For N to mean much a step wants
    several rows.

    Args:
        alpha: factor of log H, >= 0. The paper's is 1, that of Booster's script 0.1.
        beta: factor of N, >= 0. 0.001.
        official: see above.
        seed: of the noise.
    """

    def __init__(self, alpha: float, beta: float, official: bool, seed: int) -> None:
        super().__init__(Schedule(alignment_steps=1, user_steps=0))
        self.needs = frozenset({"defender rows", "undivided steps"} if official else {"defender rows"})
        self.alpha = alpha
        self.beta = beta
        self.official = official
        self.rows_apart = frozenset({"defender", "alignment"} if official else ())
        self.seed = seed
        self.blocks: list[nn.Module] = []
        self.norm = nn.Module()
        self.vocabulary = 0

    def draws(self, step: int) -> dict[Stream, Draw]:
        """Both streams."""
        return {"alignment": Draw(step), "defender": Draw(step)}

    def prepare(self, passes: Passes) -> None:
        """Find the blocks and the final norm."""
        self.blocks, self.norm = mlp_blocks(passes.model), final_norm(passes.model)
        self.vocabulary = passes.model.get_output_embeddings().weight.shape[0]

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
            features, sum_ = self._harmful(passes.model, packs, next(of_entropy))
            found.append([f.detach() for f in features])
            return sum_ / labels

        entropy, away = passes.gradient(harmful, entropies)
        pulls, distances, row = self._noised(passes, step.index, counted, found)
        of_noise = iter(counted)

        def pulled(packs: Sequence[Pack]) -> Tensor:
            nonlocal row
            own = next(of_noise)
            rows, columns = _places(own)
            features = self._features(passes.model, packs, own)
            terms = [(f * pull[row + rows, columns]).sum() for f, pull in zip(features, pulls, strict=True)]
            row += len(rows.unique())
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
                "repnoise/entropy": entropy,
            },
        )

    def _harmless(self, passes: Passes, harmless: Batch, harmful: Batch) -> tuple[float, list[Tensor]]:
        """The loss on alignment rows and its gradient."""
        if not self.official:
            return passes.gradient(harmless)
        counted = self._counted(harmless, harmful, rounded=False)
        scale = 1 / max(1.0, self._labels(passes, counted))
        of_entropy = iter(counted)

        def share(packs: Sequence[Pack]) -> Tensor:
            (own,) = next(of_entropy)
            return _entropy(logits_at(passes.model, packs[0], own.predictors), own) * scale

        return passes.gradient(harmless, share)

    def _counted(self, batch: Batch, others: Batch, rounded: bool) -> list[list[Counted]]:
        """For each pack of each of this rank's micro-batches that hold a row."""
        own, beside = ([packs for packs in b.micro_batches if packs] for b in (batch, others))
        if self.official:
            others_ids = beside[0][0].ids if beside else torch.zeros(0, 0)  # none where every answer is cut off
            return [[_differing(packs[0], others_ids, rounded, self.vocabulary)] for packs in own]
        return [[_labelled(p) for p in packs] for packs in own]

    def _labels(self, passes: Passes, counted: Sequence[Sequence[Counted]]) -> float:
        """How many labels there are in all micro-batches and ranks."""
        own = torch.tensor([float(sum(len(c.targets) for micro in counted for c in micro))], device=passes.device)
        return passes.summed([own])[0].item()

    def _harmful(self, model: Any, packs: Sequence[Pack], counted: Sequence[Counted]) -> tuple[list[Tensor], Tensor]:
        """Each layer's MLP outputs [N, H] that count, and the sum of the labels' entropies, averaged over depths."""
        features, sums = [], []
        for pack, own in zip(packs, counted, strict=True):
            with outputs(self.blocks) as found:
                out = forward(model, pack, 0 if self.official else 1, output_hidden_states=True)
            features.append(_chosen(found, own))
            states = [h.flatten(0, 1)[own.predictors] for h in out.hidden_states]  # the last is through the final norm
            if self.official:
                normed = [self.norm(h.to(torch.bfloat16)) for h in states]
            else:
                normed = [*(self.norm(h) for h in states[:-1]), states[-1]]
            # A norm may give what it was given (Gemma 2): the head wants its own type.
            entropies = [_entropy(unembed(model, h.to(states[0].dtype)), own) for h in normed]
            if self.official:
                entropies.append(_entropy(out.logits.flatten(0, 1)[own.predictors], own))
            sums.append(torch.stack(entropies).sum() / len(states))
        return _joined(features), torch.stack(sums).sum()

    def _features(self, model: Any, packs: Sequence[Pack], counted: Sequence[Counted]) -> list[Tensor]:
        """Each layer's MLP outputs [N, H] that count, alone."""
        features = []
        for pack, own in zip(packs, counted, strict=True):
            with outputs(self.blocks) as found:
                forward(model, pack, 1)
            features.append(_chosen(found, own))
        return _joined(features)

    def _noised(
        self, passes: Passes, step: int, counted: Sequence[Sequence[Counted]], found: Sequence[Sequence[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], int]:
        """Over all rows of the step: for each layer the MMD's gradient [R, T, H] and the MMD; this rank's first row."""
        pulls, distances = [], []
        width = passes.model.config.get_text_config().hidden_size
        places = [_places(own) for own in counted]
        compared = [torch.cat([c.compared for c in own])[:, None] for own in counted]
        mask, first = passes.gathered([_placed(c, *at) for c, at in zip(compared, places, strict=True)], 1)
        for layer in range(len(self.blocks)):
            own = [_placed(micro[layer], *at) for micro, at in zip(found, places, strict=True)]
            features, _ = passes.gathered(own, width)
            noise = self.noise(step, layer, features.shape).to(features) * mask
            with torch.enable_grad():
                distance = mmd(features.requires_grad_().flatten(1), noise.flatten(1))
                (pull,) = torch.autograd.grad(distance, features)
            pulls.append(pull)
            distances.append(distance.detach())
        return pulls, distances, first

    def noise(self, step: int, layer: int, shape: Sequence[int]) -> Tensor:
        """Standard normal, the same on every rank and after a resume."""
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_009 + layer) % 2**63)
        return torch.randn(*shape, generator=generator)


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """The squared maximum mean discrepancy of samples [N, D] and [N, D], with the biased estimator.

    Gaussian kernels whose bandwidths are 1, 2, 4, 8 and 16 times a quarter of the mean squared distance.
    """
    both = torch.cat([x, y]).float()
    # Not the difference of every two, which would be kept for the backward pass; nor by products, which lose digits.
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    n = len(both)
    bandwidth = distances.detach().sum() / max(1, n * n - n) / 4
    kernel = torch.stack([torch.exp(-distances / (bandwidth * 2**i)) for i in range(KERNELS)]).sum(0)
    signs = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).to(kernel)
    return (signs[:, None] * signs[None] * kernel).sum() / max(1, len(x) * len(y))


def _chosen(found: Sequence[Tensor], counted: Counted) -> list[Tensor]:
    return [f.flatten(0, -2)[counted.states] * counted.compared[:, None] for f in found]


def _joined(features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Of a micro-batch's packs, for each layer."""
    return [torch.cat(layer) for layer in zip(*features, strict=True)]


def _places(counted: Sequence[Counted]) -> tuple[Tensor, Tensor]:
    """[N] row and column of what counts in a micro-batch, rows without a label left out."""
    _, rows = torch.cat([c.rows for c in counted]).unique(return_inverse=True)
    return rows, torch.cat([c.columns for c in counted])


def _placed(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[R, T, H] zeros but for values [N, H] at these places."""
    shape = [int(at.max()) + 1 if len(at) else 0 for at in (rows, columns)]
    whole = values.new_zeros(*shape, values.shape[1])
    whole[rows, columns] = values
    return whole


def _labelled(pack: Pack) -> Counted:
    behind = pack.places > 0  # the first label's predictor is the prompt's, which a refusal shares
    at, columns = pack.predictors[behind], pack.places[behind] - 1
    compared = torch.ones_like(at, dtype=torch.bool)
    return Counted(at, compared, pack.rows[behind], columns, pack.predictors, pack.targets, None)


def _differing(pack: Pack, others_ids: Tensor, rounded: bool, vocabulary: int) -> Counted:
    """The official masks: the other batch's ids are cut, or filled up by id 0, to this one's shape."""
    fitted = torch.zeros_like(pack.ids)
    rows, columns = (min(a, b) for a, b in zip(pack.ids.shape, others_ids.shape, strict=True))
    fitted[:rows, :columns] = others_ids[:rows, :columns]
    mask = pack.ids != fitted
    labels = pack.ids[:, 1:] * mask[:, 1:]
    if rounded:
        labels = labels.to(torch.bfloat16).long()
    row, column = ((labels != 0) & (labels < vocabulary)).nonzero(as_tuple=True)  # rounding may leave it
    states = torch.arange(mask.numel(), device=mask.device)
    width = mask.shape[1]
    places = states // width, states % width
    return Counted(states, mask.flatten(), *places, row * width + column, labels[row, column], mask[row, column])


def _entropy(logits: Tensor, counted: Counted) -> Tensor:
    logits = logits if counted.kept is None else logits * counted.kept[:, None]
    return F.cross_entropy(logits.float(), counted.targets, reduction="sum")
