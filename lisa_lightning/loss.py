"""The completion loss: a micro-batch as packed token tries, logits only where a label is.

Rows of a task share long openings (template, instruction). Packed as a trie, every shared prefix is computed once and
nothing is padded: a token's position is its depth, it attends to its ancestors, and it is predicted by its parent.
Loss and gradients equal those of the padded batch through the model's own `labels=` loss.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
PACK_LIMIT = 768  # tokens; attention costs the square of it, so longer packs are split


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized row: token ids and, of the same length, labels (`IGNORED` where nothing is learnt)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of tokens that are predicted. The first token has no predictor and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(slots=True)
class Pack:
    """One trie of T tokens with S supervised positions."""

    ids: Tensor
    """[1, T] token ids, parents before children."""
    positions: Tensor
    """[1, T] depth of each token."""
    mask: Tensor
    """[1, 1, T, T] bool, True where the row token may attend to the column token."""
    predictors: Tensor
    """[S] index of the token whose logits predict the target."""
    targets: Tensor
    """[S] the labels."""

    def to(self, device: torch.device | str, **kwargs: Any) -> "Pack":
        """The same pack on another device (called by Lightning's batch transfer)."""
        tensors = (self.ids, self.positions, self.mask, self.predictors, self.targets)
        return Pack(*(t.to(device, **kwargs) for t in tensors))


def pack(examples: Iterable[Example], limit: int = PACK_LIMIT) -> list[Pack]:
    """Pack examples into as few tries of at most `limit` tokens as neighbours in sorted order allow.

    An example longer than `limit` gets a pack of its own. Examples without a supervised token are left out.
    """
    packs: list[Pack] = []
    trie = _Trie()
    for example in sorted(examples, key=lambda e: e.ids):
        if not example.supervised:
            continue
        if trie.parents and len(trie.parents) + trie.new_tokens(example.ids) > limit:
            packs.append(trie.pack())
            trie = _Trie()
        trie.insert(example)
    if trie.parents:
        packs.append(trie.pack())
    return packs


class _Trie:
    """A growing trie; node i is the i-th inserted token."""

    def __init__(self) -> None:
        self.children: dict[tuple[int, int], int] = {}
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []

    def new_tokens(self, ids: Sequence[int]) -> int:
        """How many nodes inserting `ids` would add."""
        node = -1
        for depth, token in enumerate(ids):
            child = self.children.get((node, token))
            if child is None:
                return len(ids) - depth
            node = child
        return 0

    def insert(self, example: Example) -> None:
        node = -1
        for depth, (token, label) in enumerate(zip(example.ids, example.labels, strict=True)):
            if label != IGNORED and depth > 0:
                self.predictors.append(node)
                self.targets.append(label)
            child = self.children.get((node, token))
            if child is None:
                child = self.children[node, token] = len(self.ids)
                self.ids.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child

    def pack(self) -> Pack:
        mask = np.zeros((len(self.ids), len(self.ids)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node, :node] = mask[parent, :node]
            mask[node, node] = True
        return Pack(
            ids=torch.tensor([self.ids]),
            positions=torch.tensor([self.depths]),
            mask=torch.from_numpy(mask)[None, None],
            predictors=torch.tensor(self.predictors),
            targets=torch.tensor(self.targets),
        )


def completion_loss(model: Any, packs: Sequence[Pack]) -> Tensor:
    """Sum (not mean) of the cross entropies of all supervised tokens of `packs`, in float32.

    Args:
        model: a `transformers` causal language model, its LoRA layers in place.
        packs: at least one.
    """
    return torch.stack([_pack_loss(model, p) for p in packs]).sum()


def _pack_loss(model: Any, packed: Pack) -> Tensor:
    dtype = model.get_input_embeddings().weight.dtype
    blocked = torch.zeros(packed.mask.shape, dtype=dtype, device=packed.mask.device)
    blocked.masked_fill_(~packed.mask, torch.finfo(dtype).min)
    hidden = model.base_model(
        input_ids=packed.ids, position_ids=packed.positions, attention_mask=blocked, use_cache=False
    ).last_hidden_state[0]
    logits = model.get_output_embeddings()(hidden[packed.predictors])
    return F.cross_entropy(logits.float(), packed.targets, reduction="sum")
