"""TAR: alignment that resists the fine-tuning steps of an adversary, who trains inside every step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Final, final

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, Strict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from lisa_lightning.align.base import Aligner
from lisa_lightning.config.fields import STRICT, BatchSize, Count, NonNegative, Positive, Seed, Share, Words
from lisa_lightning.config.requirements import Requirement
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.model.hooks import capture_outputs
from lisa_lightning.objective.backprop import Backprop, LossFn, State, StepOutput
from lisa_lightning.objective.loss import all_logits, label_logits

ADVERSARY_DECAY: Final = 0.01
"""Weight decay of the adversary's AdamW, torch's default, as in the official code."""
SWITCH_BETA: Final = (6.0, 3.0)
"""Parameters of the beta distribution of an attack's benign share, as in the official script."""
Rates = Annotated[
    tuple[Positive, ...], Strict(False), Field(min_length=1), Words("a list of one or more numbers above 0")
]


@plain_dataclass(frozen=True)
class Attack:
    """Draws of one attack."""

    lr: float
    """Learning rate of the adversary."""
    benign_steps: int
    """Steps on alignment rows before those on harmful rows."""


@final
@dataclass(frozen=True, config=STRICT)
class TAR(Aligner):
    """Descend retain_scale * R(w) - sum_i c_i * H(w_i) to first order (Tamirisa et al., ICLR 2025, Algorithm 1).

    w_i are the weights after i of K adversary steps from w. The adversary is a fresh AdamW on harmful rows, without
    clipping. H is the mean entropy of the predictions on held-out harmful rows, after every `subsample`-th step. Its
    gradient at w_i is applied at w. With N attacks

        c_i = grad_scale / N * exp(schedule_lambda * (i - K)), or grad_scale / (N K) without a schedule.

    R is the loss on alignment rows. With `representations` it has a second term: the distance ||h - h_0|| from the
    hidden states at the start. It is averaged over positions and depths, including the embedding.

    A step costs N * (K + K / subsample) + 1 forward and backward passes, and one forward pass with `representations`.
    At the defaults these are 8F 7B. It draws N * (K * attack_rows + held_out_rows) harmful rows, and N * K *
    attack_rows more alignment rows with `switch_share`. Memory: five more copies of the adapter, two of them the
    adversary's moments, and with `representations` the hidden states at the start of one micro-batch. All passes draw
    the same dropout masks.

    Entropy counts the positions that predict a label, which are those that the adversary trains. Distances count the
    positions up to a row's last predictor.

    Departures from the official code:
        - `optim` trains the adapter. The official code trains all weights with schedule-free AdamW, and saves the
          iterates y.
        - Training starts at the base model. The official code first maps representations of harmful rows to random
          vectors.
        - Entropy and distances count no padding. The official code counts all positions: the option `all_positions`.
        - Held-out rows are the step's other rows, so that attacks of other steps may contain them. The official ones
          are a fixed fifth of the harmful rows.
        - The first batch of alignment rows counts. The official code drops it.
        - With gradient accumulation, gradients are divided once. The official code divides them twice.
        - The reference model draws the same dropout masks. The official one draws none.
    """

    attacks: Count = 1
    """Attacks of a step, N. The official script has 1."""
    inner_steps: Count = 4
    """Steps of an adversary, K. The official script has 64."""
    subsample: Count = 2
    """Adversary steps between two measurements of the entropy, at most `inner_steps`. The official script has 4."""
    attack_lrs: Rates = (1e-4, 1e-3, 2e-3)
    """Learning rates of an adversary, one of which is drawn for each attack. The official script has 2e-6, 2e-5, 4e-5
    for all weights."""
    attack_rows: BatchSize = 4
    """Rows of an adversary's step. The official script has 4."""
    held_out_rows: BatchSize = 8
    """Rows whose entropy is measured, for each attack. The official script has 8."""
    switch_share: Share = 0.0
    """Probability that an attack starts on alignment rows, for a share of its steps from Beta(6, 3). The official
    script has 1/3."""
    grad_scale: NonNegative = 4.0
    """Factor of the entropy; 0 leaves only R. The official script has 4."""
    retain_scale: NonNegative = 1.0
    """Factor of R. The official script has 1."""
    schedule_lambda: NonNegative | None = 0.0625
    """Growth of the factors over an attack; None for equal factors 1/K. The official script has 0.0625."""
    representations: bool = True
    """Keep the hidden states of alignment rows close to those at the start. The official script does."""
    lower_bound: float | None = None
    """Smallest -sum of c_i * H at which the entropy's gradient counts; None for no bound, as in the official script.
    The sum grows with the factors and the number of measurements."""
    all_positions: bool = False
    """Count entropy and distances at all positions, prompts and padding included, as the official code does."""
    seed: Seed = 0
    """Seed of the attacks' draws."""

    def __post_init__(self) -> None:
        if self.subsample > self.inner_steps:
            raise ValueError(
                f"subsample={self.subsample} and inner_steps={self.inner_steps}: the entropy is never measured. "
                "Fix: subsample of at most inner_steps"
            )

    @property
    def requirements(self) -> frozenset[Requirement]:
        """Harmful rows of the provider. If padding counts, also a single micro-batch."""
        return frozenset({"defender_rows", "single_micro_batch"} if self.all_positions else {"defender_rows"})

    @property
    def unpacked_streams(self) -> frozenset[Stream]:
        """Alignment and harmful rows, if padding counts."""
        return frozenset({"alignment", "defender"} if self.all_positions else ())

    def plan(self, step: int) -> dict[Stream, StreamBatch]:
        """Return the batches of a step.

        The first batch of alignment rows is that of R. Adversaries that start on alignment rows have further ones. Each
        attack has a batch of held-out rows, then its K batches of harmful rows.
        """
        adversary = (self.attack_rows,) * self.inner_steps
        held_out, *harmful = (self.held_out_rows, *adversary) * self.attacks
        return {
            "alignment": StreamBatch(step, further=adversary * self.attacks if self.switch_share > 0 else ()),
            "defender": StreamBatch(step, held_out, tuple(harmful)),
        }

    def init(self, backprop: Backprop) -> State:
        """Return the state. Raises UserError if the model lacks layers or a final norm, whose outputs are compared."""
        if self.representations:
            _ = _depths(backprop)
        return super().init(backprop)

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        """Return the gradient of R minus those of the entropies, which are taken at the adversaries' weights."""
        tamper_gradients = [torch.zeros_like(weight) for weight in backprop.weights]
        losses: list[float] = []
        entropies: list[float] = []
        for attack, batches, held_out in self._attacks(step):
            measured = self._attack(backprop, attack.lr, batches, held_out, tamper_gradients)
            losses += measured[0]
            entropies += measured[1]
        factors = [*self.factors.values()] * self.attacks
        penalty = -sum(factor * entropy for factor, entropy in zip(factors, entropies, strict=True))
        loss, gradients, metrics = self._retain(backprop, step.main, state["anchor"])
        gradients = [self.retain_scale * gradient for gradient in gradients]
        if self.lower_bound is None or penalty >= self.lower_bound:
            gradients = [g + tamper for g, tamper in zip(gradients, tamper_gradients, strict=True)]
        metrics |= {
            "tar/penalty": penalty,
            "tar/entropy": sum(entropies) / len(entropies),
            "tar/attack_loss": sum(losses) / len(losses),
        }
        return StepOutput(loss, gradients, metrics)

    @property
    def factors(self) -> dict[int, float]:
        """Factor of the entropy, by the 0-based index of the adversary's step after which it is measured."""
        scale, last = self.grad_scale / self.attacks, self.inner_steps - 1
        measured = range(self.subsample - 1, self.inner_steps, self.subsample)
        if self.schedule_lambda is None:
            return dict.fromkeys(measured, scale / self.inner_steps)
        return {inner: scale * math.exp(self.schedule_lambda * (inner - last)) for inner in measured}

    def draw(self, step: int) -> list[Attack]:
        """Return the attacks of a step; equal on every rank and after a resume."""
        rng = np.random.default_rng([self.seed, step])
        attacks = []
        for _ in range(self.attacks):
            lr, switches = float(rng.choice(self.attack_lrs)), rng.random() < self.switch_share
            benign_steps = int(rng.beta(*SWITCH_BETA) * self.inner_steps)
            attacks.append(Attack(lr, benign_steps if switches else 0))
        return attacks

    def _attacks(self, step: Step) -> Iterator[tuple[Attack, list[Batch], Batch]]:
        """Yield each attack of a step with its adversary's batches and the held-out batch."""
        count, defender = self.inner_steps, step.batches["defender"]
        harmful, benign = iter([defender, *defender.further]), iter(step.main.further)
        for attack in self.draw(step.index):
            held_out, *batches = (next(harmful) for _ in range(count + 1))
            if self.switch_share > 0:
                starts = [next(benign) for _ in range(count)]
                batches = starts[: attack.benign_steps] + batches[attack.benign_steps :]
            yield attack, batches, held_out

    def _attack(
        self, backprop: Backprop, lr: float, batches: Sequence[Batch], held_out: Batch, sums: Sequence[Tensor]
    ) -> tuple[list[float], list[float]]:
        """Train an adversary, and add the gradients of its negative entropies, with their factors, to `sums`.

        Returns:
            The loss of each of its steps, and the measured entropies.
        """
        losses, entropies = [], []
        tamper_loss = self.tamper_loss(backprop, held_out)
        weights = [weight.detach().clone() for weight in backprop.weights]
        adversary = torch.optim.AdamW(weights, lr=lr, weight_decay=ADVERSARY_DECAY)
        with backprop.swapped_weights(weights):
            for inner, batch in enumerate(batches):
                loss, gradients = backprop.gradient(batch)
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight.grad = gradient
                adversary.step()
                backprop.set_weights(weights)
                losses.append(loss)
                if (factor := self.factors.get(inner)) is not None:
                    negative_entropy, gradients = backprop.gradient(held_out, tamper_loss)
                    for sum_, gradient in zip(sums, gradients, strict=True):
                        sum_.add_(gradient, alpha=factor)
                    entropies.append(-negative_entropy)
        return losses, entropies

    def _retain(
        self, backprop: Backprop, batch: Batch, anchor: Sequence[Tensor]
    ) -> tuple[float, list[Tensor], dict[str, float]]:
        """Return the mean loss on alignment rows, the gradients of R, and metrics."""
        if not self.representations:
            return *backprop.gradient(batch), {}
        totals = torch.zeros(2, device=backprop.device)
        _, gradients = backprop.gradient(batch, self.retain_loss(backprop, batch, anchor, totals))
        loss, distance = backprop.all_reduce_sum([totals])[0].tolist()
        return loss, gradients, {"tar/distance": distance}

    def tamper_loss(self, backprop: Backprop, held_out: Batch) -> LossFn:
        """Return the loss function of the negative mean entropy of the predictions on held-out rows."""
        scale = 1 / self._position_count(backprop, held_out) if self.all_positions else 1 / max(1, held_out.tokens)

        def negative_entropy(packs: Sequence[Pack], _: int) -> Tensor:
            return torch.stack([self._negative_entropy(backprop.model, p) for p in packs]).sum() * scale

        return negative_entropy

    def retain_loss(self, backprop: Backprop, batch: Batch, anchor: Sequence[Tensor], totals: Tensor) -> LossFn:
        """Return the loss function of R with representations.

        Args:
            backprop: the passes of the step.
            batch: the alignment rows.
            anchor: the weights at the start.
            totals: [2] to which the function adds this rank's mean loss and distance.
        """
        mean_loss, depths = backprop.mean_loss(batch), _depths(backprop)
        scale = 1 / (self._position_count(backprop, batch) * len(depths))

        def loss_and_distance(packs: Sequence[Pack], index: int) -> Tensor:
            with backprop.reference_pass(anchor), capture_outputs(depths) as references:
                mean_loss(packs, index)
            with capture_outputs(depths) as states:
                loss = mean_loss(packs, index)
            counts = [self._position_weights(p) for p in packs for _ in depths]
            terms = zip(states, references, counts, strict=True)
            distances = [(_norms(state - reference) * count).sum() for state, reference, count in terms]
            distance = torch.stack(distances).sum() * scale
            totals.add_(torch.stack([loss, distance]).detach())
            return loss + distance

        return loss_and_distance

    def _negative_entropy(self, model: nn.Module, packed: Pack) -> Tensor:
        """Return the negative entropy of the predictions, summed over the positions of a pack."""
        logits = (all_logits if self.all_positions else label_logits)(model, [packed])
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        return (log_probabilities.exp() * log_probabilities).sum()

    def _position_weights(self, packed: Pack) -> Tensor:
        """Return the number of rows for which each position counts, [R, T]."""
        return packed.token_count if self.all_positions else packed.row_count

    def _position_count(self, backprop: Backprop, batch: Batch) -> float:
        """Return the number of positions that count in all micro-batches and ranks, at least 1."""
        counts = [self._position_weights(p).sum() for packs in batch.nonempty for p in packs]
        total = torch.stack([torch.zeros((), device=backprop.device), *counts]).sum()
        return max(1.0, backprop.all_reduce_sum([total])[0].item())


def _depths(backprop: Backprop) -> list[nn.Module]:
    """Return the modules whose outputs are the hidden states. The last layer's pass the final norm."""
    return [backprop.model.get_input_embeddings(), *backprop.layers[:-1], backprop.final_norm]


def _norms(differences: Tensor) -> Tensor:
    """Return the Euclidean norm at each position, [R, T] in float32; its derivative at zero is zero."""
    return torch.linalg.vector_norm(differences.float(), dim=-1)
