"""Examples of a micro-batch as what the model computes on: packed token tries or, for models that can't, padded rows.

Rows of a task share long openings (template, instruction). Packed as a trie, every shared prefix is computed once and
nothing is padded: a token's position is its depth, it attends to its ancestors, and it is predicted by its parent.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
MEMORY_LIMIT = 1024  # tokens up to which rows are joined; the mask takes the square of that
ATTENTION_COST = 1 / 2000
"""Cost of a token's attention to one other, relative to that of its matrix products: SmolLM2-135M on a CPU."""


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized row: token ids and, of the same length, labels (`IGNORED` where nothing is learnt)."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of tokens that are predicted. The first token has no predictor and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def length(self) -> int:
        """Number of tokens that the model must see: none after the last predictor counts for anything."""
        return next((i for i in range(len(self.labels) - 1, 0, -1) if self.labels[i] != IGNORED), 0)


@dataclass(slots=True)
class Pack:
    """What one forward pass takes: R rows of T tokens with S supervised positions among them."""

    ids: Tensor
    """[R, T] token ids. A trie is one row, parents before children."""
    mask: Tensor
    """bool; a trie's is [1, 1, T, T], True where the row token may attend to the column token; that of padded rows is
    [R, T], False on padding."""
    positions: Tensor | None
    """[1, T] depth of each token of a trie; None for padded rows."""
    predictors: Tensor
    """[S] index, in ids.flatten(), of the token whose logits predict the target."""
    targets: Tensor
    """[S] the labels."""
    shared_by: Tensor
    """[R, T] float, the number of rows that a token stands for; 0 on padding and after a row's last predictor."""
    places: Tensor
    """[S] how many of its row's labels stand before the target."""
    rows: Tensor
    """[S] a number for the target's row, which rises with the rows of the micro-batch."""

    def to(self, device: torch.device | str, **kwargs: object) -> "Pack":
        """The same pack on another device (called by Lightning's batch transfer)."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, **kwargs)  # type: ignore[arg-type]

        positions = None if self.positions is None else moved(self.positions)
        return Pack(
            moved(self.ids),
            moved(self.mask),
            positions,
            moved(self.predictors),
            moved(self.targets),
            moved(self.shared_by),
            moved(self.places),
            moved(self.rows),
        )


Packing = Callable[[Iterable[Example]], list[Pack]]
"""`pack` or `pad`: the packs of a micro-batch; examples without a supervised token are left out."""


def pack(examples: Iterable[Example]) -> list[Pack]:
    """Tries of neighbours in sorted order, a new one where joining costs more than standing alone."""
    packs: list[Pack] = []
    trie = _Trie()
    for row, example in sorted(enumerate(examples), key=lambda numbered: numbered[1].ids):
        if not example.supervised:
            continue
        joined = len(trie.ids) + trie.new_tokens(example)
        if trie.ids and (joined > MEMORY_LIMIT or _cost(joined) - _cost(len(trie.ids)) > _cost(example.length)):
            packs.append(trie.pack())
            trie = _Trie()
        trie.insert(example, row)
    if trie.ids:
        packs.append(trie.pack())
    return packs


def _cost(tokens: int) -> float:
    return tokens + ATTENTION_COST * tokens * tokens


class _Trie:
    """A growing trie; node i is the i-th inserted token."""

    def __init__(self) -> None:
        self.children: dict[tuple[int, int], int] = {}
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.predictors: list[int] = []
        self.targets: list[int] = []
        self.shared_by: list[int] = []
        self.places: list[int] = []
        self.rows: list[int] = []

    def new_tokens(self, example: Example) -> int:
        """How many nodes inserting `example` would add."""
        node, length = -1, example.length
        for depth in range(length):
            child = self.children.get((node, example.ids[depth]))
            if child is None:
                return length - depth
            node = child
        return 0

    def insert(self, example: Example, row: int) -> None:
        node, place, length = -1, 0, example.length
        for depth in range(length + 1):
            label = example.labels[depth]
            if label != IGNORED and depth > 0:
                self.predictors.append(node)
                self.targets.append(label)
                self.places.append(place)
                self.rows.append(row)
                place += 1
            if depth < length:
                node = self._child(node, example.ids[depth], depth)
                self.shared_by[node] += 1

    def _child(self, parent: int, token: int, depth: int) -> int:
        child = self.children.get((parent, token))
        if child is None:
            child = self.children[parent, token] = len(self.ids)
            self.ids.append(token)
            self.parents.append(parent)
            self.depths.append(depth)
            self.shared_by.append(0)
        return child

    def pack(self) -> Pack:
        mask = np.zeros((len(self.ids), len(self.ids)), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                mask[node, :node] = mask[parent, :node]
            mask[node, node] = True
        return Pack(
            ids=torch.tensor([self.ids]),
            mask=torch.from_numpy(mask)[None, None],
            positions=torch.tensor([self.depths]),
            predictors=torch.tensor(self.predictors),
            targets=torch.tensor(self.targets),
            shared_by=torch.tensor([self.shared_by], dtype=torch.float32),
            places=torch.tensor(self.places),
            rows=torch.tensor(self.rows),
        )


def pad(examples: Iterable[Example]) -> list[Pack]:
    """One pack, every example a row of its own, padded on the right to the longest."""
    rows = [e for e in examples if e.supervised]
    if not rows:
        return []
    width = max(len(e.ids) for e in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    labels = torch.full((len(rows), width), IGNORED)
    for i, example in enumerate(rows):
        length = len(example.ids)
        ids[i, :length] = torch.tensor(example.ids)
        mask[i, :length] = True
        labels[i, :length] = torch.tensor(example.labels)
    return [padded(ids, mask, labels)]


def padded(ids: Tensor, mask: Tensor, labels: Tensor) -> Pack:
    """Rows that are padded already: ids, mask (bool) and labels, each [R, T]."""
    counted = labels[:, 1:] != IGNORED
    row, column = counted.nonzero(as_tuple=True)
    places = (counted.cumsum(1) - 1)[row, column]
    predictors = row * ids.shape[1] + column
    needed = torch.zeros_like(mask)
    needed[:, :-1] = counted.flip(1).cumsum(1).flip(1) > 0
    return Pack(ids, mask, None, predictors, labels[row, column + 1], (needed & mask).float(), places, row)
