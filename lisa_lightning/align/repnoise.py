"""RepNoise: alignment that turns the model's representations of harmful rows into noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Final, final

import torch
import torch.nn.functional as F
from pydantic.dataclasses import dataclass
from torch import Tensor

from lisa_lightning.align.base import Aligner
from lisa_lightning.config.fields import STRICT, NonNegative, Seed
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.model.hooks import capture_outputs
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.loss import forward, logits_at, unembed

KERNELS: Final = 5


@plain_dataclass(frozen=True)
class LabelPositions:
    """Positions of a pack that enter RepNoise's loss terms."""

    states: Tensor
    """[N] index of a token whose MLP outputs are compared with noise."""
    compared: Tensor
    """[N] bool; False where the official code sets both to zero."""
    rows: Tensor
    """[N] a number for the token's row, as in a pack."""
    columns: Tensor
    """[N] index of the token in its row, or in its answer."""
    logit_positions: Tensor
    """[S] index of the token that predicts a label."""
    targets: Tensor
    """[S] the labels."""
    logit_mask: Tensor | None
    """[S] factor of the logits: 0 where the official code sets them to zero; None for no mask."""


Features = list[Tensor]
"""[N, H] MLP outputs of the compared tokens of a micro-batch, for each layer."""


@final
@dataclass(frozen=True, config=STRICT)
class RepNoise(Aligner):
    """Descend CE(harmless) + beta * N - alpha * log H (Rosati et al., NeurIPS 2024, Eq. 4 and 5; port in Booster).

    N is the mean over layers of the maximum mean discrepancy (five Gaussian kernels) between noise and the MLP outputs
    of harmful rows. H is 1 plus the cross-entropy of their labels, averaged over the hidden states of all depths, each
    through the final norm and the unembedding. H is computed from a row's labels, N from the tokens of its answer
    except the last, position by position.

    N and log H depend on all harmful rows of the step, whatever their split. So these rows take one pass for H and,
    when all activations are known, one for N: three forward and three backward passes a step, one of them with the
    unembedding of every depth. For a meaningful N a step needs several rows.

    Departures of the official code, with `official` followed to the letter:
        - The positions at which ids of harmful and harmless rows differ count, padding included, though the rows are
          no pairs.
        - Logits at other positions are set to zero, not left out. Labels with id 0 do not count.
        - Ids of harmful labels are rounded to bfloat16, which changes ids above 256. A rounded id above the vocabulary
          is no label here; there it is an error.
        - Hidden states are rounded to bfloat16 before the final norm, which the last one passes twice.
        - n + 1 cross-entropies are divided by n.
        - Masks compare padded rows of two micro-batches, so the rows of a step must not be split. Padding has id 0, as
          in the recorded cases. (The official code adds a padding token to a model without one. Its id counts as a
          label.)
    """

    alpha: NonNegative = 1.0
    """Factor of log H. The paper's value is 1, Booster's script has 0.1."""
    beta: NonNegative = 0.001
    """Factor of N. The paper's value is 0.001."""
    official: bool = False
    """Follow Booster's port, masks and rounding included."""
    seed: Seed = 0
    """Seed of the noise."""

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider; for the official masks also undivided steps."""
        return frozenset({"defender_rows", "single_micro_batch"} if self.official else {"defender_rows"})

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """Alignment and harmful rows, for the official masks."""
        return frozenset({"defender", "alignment"} if self.official else ())

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return a batch of alignment rows and one of harmful rows."""
        return {"alignment": StreamBatch(step), "defender": StreamBatch(step)}

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if the model lacks MLP blocks or a final norm."""
        _ = backprop.mlp_blocks, backprop.final_norm
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of the three terms."""
        harmless, harmful = step.main, step.batches["defender"]
        loss, gradients = self._harmless_gradient(backprop, harmless, harmful)
        positions = self._positions(backprop, harmful, harmless, rounded=True)
        labels = _label_count(backprop, positions)
        if labels == 0:  # every answer is truncated
            return StepOutput(loss, gradients)
        features: list[Features] = []

        def entropy_loss(packs: Sequence[Pack], index: int) -> Tensor:
            outputs, entropies = self._features_and_entropies(backprop, packs, positions[index])
            features.append([output.detach() for output in outputs])
            return entropies / labels

        entropy, entropy_gradients = backprop.gradient(harmful, entropy_loss)
        noise_gradients, distances, first_row = self._noise_gradients(backprop, step.index, positions, features)
        starts = _row_starts(first_row, positions)

        def noise_loss(packs: Sequence[Pack], index: int) -> Tensor:
            rows, columns = _rows_and_columns(positions[index])
            outputs = self._features(backprop, packs, positions[index])
            # The derivative of N by the features is known, so this has N's gradient.
            pairs = zip(outputs, noise_gradients, strict=True)
            return torch.stack([(f * g[starts[index] + rows, columns]).sum() for f, g in pairs]).mean()

        _, mmd_gradients = backprop.gradient(harmful, noise_loss)
        mean_mmd = torch.stack(distances).mean().item()
        terms = zip(gradients, entropy_gradients, mmd_gradients, strict=True)
        return StepOutput(
            loss,
            [g - self.alpha / (1 + entropy) * h + self.beta * n for g, h, n in terms],
            {
                "repnoise/penalty": self.beta * mean_mmd - self.alpha * math.log1p(entropy),
                "repnoise/mmd": mean_mmd,
                "repnoise/entropy": entropy,
            },
        )

    def noise(self, step: int, layer: int, shape: Sequence[int]) -> Tensor:
        """Return standard normal noise, equal on every rank and after a resume."""
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_009 + layer) % 2**63)
        return torch.randn(*shape, generator=generator)

    def _harmless_gradient(self, backprop: Backprop, harmless: Batch, harmful: Batch) -> tuple[float, list[Tensor]]:
        """Return the loss on alignment rows and its gradients."""
        if not self.official:
            return backprop.gradient(harmless)
        positions = self._positions(backprop, harmless, harmful, rounded=False)
        scale = 1 / max(1.0, _label_count(backprop, positions))

        def masked_loss(packs: Sequence[Pack], index: int) -> Tensor:
            (own,) = positions[index]
            return _cross_entropy(logits_at(backprop.model, packs[0], own.logit_positions), own) * scale

        return backprop.gradient(harmless, masked_loss)

    def _positions(
        self, backprop: Backprop, batch: Batch, compared_with: Batch, rounded: bool
    ) -> list[list[LabelPositions]]:
        """Return the label positions of every non-empty micro-batch of this rank, one list per micro-batch."""
        if not self.official:
            return [[_label_positions(p) for p in packs] for packs in batch.nonempty]
        other = compared_with.nonempty
        other_ids = other[0][0].ids if other else torch.zeros(0, 0)  # empty if every answer is truncated
        vocabulary = backprop.model.get_output_embeddings().weight.shape[0]
        return [[_differing_positions(packs[0], other_ids, rounded, vocabulary)] for packs in batch.nonempty]

    def _features_and_entropies(
        self, backprop: Backprop, packs: Sequence[Pack], positions: Sequence[LabelPositions]
    ) -> tuple[Features, Tensor]:
        """Return the features of a micro-batch, and the labels' cross-entropies, summed and averaged over depths."""
        features, sums = [], []
        for pack, labels in zip(packs, positions, strict=True):
            with capture_outputs(backprop.mlp_blocks) as outputs:
                out = forward(backprop.model, pack, 0 if self.official else 1, output_hidden_states=True)
            features.append(_compared(outputs, labels))
            hidden_states = [h.flatten(0, 1)[labels.logit_positions] for h in out.hidden_states]
            entropies = self._entropies(backprop, hidden_states, labels)
            if self.official:
                entropies.append(_cross_entropy(out.logits.flatten(0, 1)[labels.logit_positions], labels))
            sums.append(torch.stack(entropies).sum() / len(hidden_states))
        return _concatenated(features), torch.stack(sums).sum()

    def _entropies(
        self, backprop: Backprop, hidden_states: Sequence[Tensor], positions: LabelPositions
    ) -> list[Tensor]:
        """Return the cross-entropy of the labels from the hidden states of each depth."""
        if self.official:
            normed = [backprop.final_norm(h.to(torch.bfloat16)) for h in hidden_states]
        else:  # the last hidden states have passed the final norm already
            normed = [*(backprop.final_norm(h) for h in hidden_states[:-1]), hidden_states[-1]]
        # A norm may return float32 (Gemma 2), and the head needs its own precision.
        dtype = hidden_states[0].dtype
        return [_cross_entropy(unembed(backprop.model, h.to(dtype)), positions) for h in normed]

    def _features(self, backprop: Backprop, packs: Sequence[Pack], positions: Sequence[LabelPositions]) -> Features:
        """Return the features of a micro-batch."""
        features = []
        for pack, labels in zip(packs, positions, strict=True):
            with capture_outputs(backprop.mlp_blocks) as outputs:
                forward(backprop.model, pack, 1)
            features.append(_compared(outputs, labels))
        return _concatenated(features)

    def _noise_gradients(
        self,
        backprop: Backprop,
        step: int,
        positions: Sequence[Sequence[LabelPositions]],
        features: Sequence[Features],
    ) -> tuple[list[Tensor], list[Tensor], int]:
        """Return the derivative of the MMD by the features of all rows of the step.

        Returns:
            For each layer the derivative [R, T, H]; for each layer the MMD; the index of this rank's first row.
        """
        gradients, distances = [], []
        width = backprop.model.config.get_text_config().hidden_size
        indices = [_rows_and_columns(micro_batch) for micro_batch in positions]
        compared = [torch.cat([p.compared for p in micro_batch])[:, None] for micro_batch in positions]
        mask, first = backprop.all_gather_rows([_scattered(c, *at) for c, at in zip(compared, indices, strict=True)], 1)
        for layer in range(len(backprop.mlp_blocks)):
            local = [_scattered(micro_batch[layer], *at) for micro_batch, at in zip(features, indices, strict=True)]
            rows, _ = backprop.all_gather_rows(local, width)
            noise = self.noise(step, layer, rows.shape).to(rows) * mask
            with torch.enable_grad():
                distance = mmd(rows.requires_grad_().flatten(1), noise.flatten(1))
                gradients += torch.autograd.grad(distance, rows)
            distances.append(distance.detach())
        return gradients, distances, first


def mmd(x: Tensor, y: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of two samples, by the biased estimator.

    The kernels are Gaussian. Their bandwidths are 1, 2, 4, 8 and 16 times a quarter of the mean squared distance.

    Args:
        x: [N, D].
        y: [N, D].
    """
    both = torch.cat([x, y]).float()
    # Differences of all pairs would be stored for the backward pass, and distances by products lose digits.
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    n = len(both)
    bandwidth = distances.detach().sum() / max(1, n * n - n) / 4
    kernel = torch.stack([torch.exp(-distances / (bandwidth * 2**i)) for i in range(KERNELS)]).sum(0)
    signs = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).to(kernel)
    return (signs[:, None] * signs[None] * kernel).sum() / max(1, len(x) * len(y))


def _label_count(backprop: Backprop, positions: Sequence[Sequence[LabelPositions]]) -> float:
    """Return the number of labels in all micro-batches and ranks."""
    count = float(sum(len(p.targets) for micro_batch in positions for p in micro_batch))
    return backprop.all_reduce_sum([torch.tensor([count], device=backprop.device)])[0].item()


def _row_starts(first: int, positions: Sequence[Sequence[LabelPositions]]) -> list[int]:
    """Return the index, among the rows of the step, of the first row of each micro-batch of this rank."""
    starts = [first]
    for micro_batch in positions:
        starts.append(starts[-1] + len(torch.cat([p.rows for p in micro_batch]).unique()))
    return starts


def _compared(outputs: Sequence[Tensor], positions: LabelPositions) -> Features:
    return [output.flatten(0, -2)[positions.states] * positions.compared[:, None] for output in outputs]


def _concatenated(features: Sequence[Features]) -> Features:
    """Return the features of a micro-batch from those of its packs."""
    return [torch.cat(layer) for layer in zip(*features, strict=True)]


def _rows_and_columns(positions: Sequence[LabelPositions]) -> tuple[Tensor, Tensor]:
    """Return row and column, [N] each, of the compared tokens of a micro-batch; rows without a label are left out."""
    _, rows = torch.cat([p.rows for p in positions]).unique(return_inverse=True)
    return rows, torch.cat([p.columns for p in positions])


def _scattered(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return [R, T, H] zeros with values [N, H] at the given rows and columns."""
    shape = [int(index.max()) + 1 if len(index) else 0 for index in (rows, columns)]
    zeros = values.new_zeros(*shape, values.shape[1])
    zeros[rows, columns] = values
    return zeros


def _label_positions(pack: Pack) -> LabelPositions:
    # The token that predicts the first label belongs to the prompt, which a refusal has too.
    later = pack.label_index > 0
    states, columns = pack.logit_positions[later], pack.label_index[later] - 1
    compared = torch.ones_like(states, dtype=torch.bool)
    return LabelPositions(states, compared, pack.row_index[later], columns, pack.logit_positions, pack.targets, None)


def _differing_positions(pack: Pack, other_ids: Tensor, rounded: bool, vocabulary: int) -> LabelPositions:
    """Return the positions of the official masks, which compare ids [R, T] with those of another batch.

    The other ids are cut, or filled with id 0, to the shape of the pack.
    """
    fitted = torch.zeros_like(pack.ids)
    rows, columns = (min(a, b) for a, b in zip(pack.ids.shape, other_ids.shape, strict=True))
    fitted[:rows, :columns] = other_ids[:rows, :columns]
    mask = pack.ids != fitted
    labels = pack.ids[:, 1:] * mask[:, 1:]
    if rounded:
        labels = labels.to(torch.bfloat16).long()
    row, column = ((labels != 0) & (labels < vocabulary)).nonzero(as_tuple=True)  # a rounded id may be too large
    states = torch.arange(mask.numel(), device=mask.device)
    width = mask.shape[1]
    return LabelPositions(
        states,
        mask.flatten(),
        rows=states // width,
        columns=states % width,
        logit_positions=row * width + column,
        targets=labels[row, column],
        logit_mask=mask[row, column],
    )


def _cross_entropy(logits: Tensor, positions: LabelPositions) -> Tensor:
    masked = logits if positions.logit_mask is None else logits * positions.logit_mask[:, None]
    return F.cross_entropy(masked.float(), positions.targets, reduction="sum")
