"""Generation of answers to encoded prompts: `Generator`, and `LocalGenerator` for a model of this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

import torch
from transformers import PreTrainedTokenizerBase

from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.generate import Stop, generate, most_probable


@dataclass(frozen=True, slots=True)
class Prompt:
    """A distinct prompt, with the questions that have it."""

    ids: list[int]
    prefill: list[int]
    """First ids of the answer."""
    max_new_tokens: int
    is_safety: bool
    """True for a harmful or harmless request."""
    sample: int
    """Number of the sample, if the prompt is answered several times."""
    request: str
    """Text of the question, without the template."""
    context: str
    question_indices: list[int]

    @property
    def group(self) -> tuple[int, bool]:
        """Properties that all prompts of a batch share."""
        return self.max_new_tokens, self.is_safety

    @property
    def input_ids(self) -> list[int]:
        """Ids that the model continues: the prompt and the first ids of the answer."""
        return self.ids + self.prefill


class Generated(NamedTuple):
    """An answer to a prompt, as generated."""

    question_indices: list[int]
    """The questions that have the prompt."""
    text: str
    """The answer with its first words, without special tokens. It may contain a second `### Response:`."""
    cut_off: bool
    """True if the answer was truncated at the maximum number of tokens."""


class Generator(Protocol):
    """Model that answers prompts."""

    def generate(self, batches: Sequence[Sequence[Prompt]]) -> Iterator[list[Generated]]:
        """Yield answers as they are done, equal on all ranks.

        Args:
            batches: prompts of a batch have equal `Prompt.group` and similar lengths.
        """
        ...


@final
class LocalGenerator:
    """A model of this process. Each rank generates every `world_size`-th batch.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        decoding: generation of answers to safety prompts.
        fabric: the ranks.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, decoding: Decoding, fabric: Any) -> None:
        self._model, self._decoding, self._fabric = model, decoding, fabric
        self._stop = Stop(tokenizer, model)

    def generate(self, batches: Sequence[Sequence[Prompt]]) -> Iterator[list[Generated]]:
        """Yield the answers to one batch of each rank at a time."""
        world, rank = self._fabric.world_size, self._fabric.global_rank
        for start in range(0, len(batches), world):
            rank_batches = batches[start + rank : start + world][:1]
            answers = [answer for batch in rank_batches for answer in self._answer(batch)]
            if not rank_batches:
                # The passes of a sharded model need every rank.
                generate(self._model, [], 0, self._stop)
            yield [answer for answers_of_rank in _gather(answers, world) for answer in answers_of_rank]

    def _answer(self, batch: Sequence[Prompt]) -> Iterator[Generated]:
        """Yield the answer to each prompt of a batch."""
        inputs, choose = [p.input_ids for p in batch], most_probable
        if batch[0].is_safety and self._decoding.temperature:
            choose = self._decoding.sampler(inputs, [p.sample for p in batch])
        answers = generate(self._model, inputs, batch[0].max_new_tokens, self._stop, choose)
        for prompt, ids in zip(batch, answers, strict=True):
            text, cut = self._stop.text(prompt.prefill + ids), not self._stop(ids)
            yield Generated(prompt.question_indices, text, cut)


def _gather(answers: list[Generated], world: int) -> list[list[Generated]]:
    if world == 1:
        return [answers]
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, answers)
    return gathered
