"""Options of how answers to safety prompts are generated: `Decoding`, greedy or with several samples a prompt."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from lisa_lightning.runtime.cache import short_hash

SEED_DIGITS: Final = 15
"""Hexadecimal digits of a generator's seed, which must fit into 63 bits."""


@final
@dataclass(frozen=True)
class Decoding:
    """Sampling of answers to safety prompts. Task rows are always answered greedily.

    Each token is drawn from softmax(logits / temperature), restricted to the nucleus (Holtzman et al. 2020). That is
    the smallest set of most probable tokens whose probability reaches `top_p`. Temperature 0 is greedy.
    """

    samples: int = 1
    """Answers to each safety prompt; more than one needs a temperature above 0."""
    temperature: float = 0.0
    top_p: float = 1.0
    """Probability of the nucleus, above 0 and up to 1."""
    seed: int = 0
    """Seed of the draws, without effect at temperature 0."""

    @property
    def key(self) -> dict[str, Any]:
        """The options as a part of a cache key; {} for greedy answers."""
        return {"decoding": asdict(self)} if self.temperature else {}

    @property
    def summary(self) -> str:
        """The options in words; "" for greedy answers."""
        if not self.temperature:
            return ""
        nucleus = f" and top_p {self.top_p:g}" if self.top_p < 1 else ""
        return f"{self.samples} sampled at temperature {self.temperature:g}{nucleus}"

    def sampler(self, prompts: Sequence[Sequence[int]], samples: Sequence[int]) -> "NucleusSampler":
        """Return the sampler of a batch.

        The draws of an answer depend on seed, prompt and number of the sample alone. They are the same in any batch, on
        any rank and in a resumed run.

        Args:
            prompts: token ids of each prompt.
            samples: number of the sample of each prompt.
        """
        seeds = [self.draw_seed(ids, sample) for ids, sample in zip(prompts, samples, strict=True)]
        return NucleusSampler(self.temperature, self.top_p, seeds)

    def draw_seed(self, ids: Sequence[int], sample: int) -> int:
        """Return the seed of the draws of an answer, below 2^60.

        Args:
            ids: token ids of the prompt.
            sample: number of the sample.
        """
        return int(short_hash([self.seed, sample, *ids])[:SEED_DIGITS], 16)


GREEDY: Final = Decoding()


@final
class NucleusSampler:
    """Draws the next token of each row with a generator of its own.

    Args:
        temperature: divisor of the logits, above 0.
        top_p: probability of the nucleus.
        seeds: seed of each row.
    """

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Return a token for each row, by inversion of the distribution function.

        Args:
            logits: logits of the next token, rows x vocabulary.
            rows: indices of the rows in the batch.
        """
        draws = [torch.rand((), generator=self.generators[row], dtype=torch.float64) for row in rows]
        probabilities = (logits.double() / self.temperature).softmax(dim=-1)
        probabilities, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = probabilities.cumsum(dim=-1)
        nucleus = (cumulative - probabilities < self.top_p).sum(dim=-1, keepdim=True)
        mass = cumulative.gather(-1, nucleus - 1)
        thresholds = torch.stack(draws).to(logits.device)[:, None] * mass
        # A draw next to 1 may round up to the mass.
        positions = torch.searchsorted(cumulative, thresholds, right=True).minimum(nucleus - 1)
        return tokens.gather(-1, positions)[:, 0]
