"""Pack the examples of a micro-batch as token tries (`pack`), or pad them for models without tree attention (`pad`).

Rows of a task share long prefixes (template, instruction). In a trie every shared prefix is computed once, without any
padding. A token's position is its depth, it attends to its ancestors, and its parent predicts it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

IGNORED = -100
MAX_PACK_TOKENS = 1024
"""Tokens up to which rows are joined into one trie. The memory of the mask is quadratic in them."""
ATTENTION_COST = 1 / 2000
"""Cost of attending to one token, relative to a token's matrix products; measured with SmolLM2-135M on a CPU."""


@dataclass(frozen=True, slots=True)
class Example:
    """Tokenized row: token ids, and labels of the same length with `IGNORED` at tokens that are not learnt."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def supervised(self) -> int:
        """Number of supervised tokens. The first token has no predictor and never counts."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def length(self) -> int:
        """Number of tokens that the model must process, up to the predictor of the last label."""
        return next((i for i in range(len(self.labels) - 1, 0, -1) if self.labels[i] != IGNORED), 0)


@dataclass(slots=True)
class Pack:
    """Input of one forward pass: R rows of T tokens with S supervised positions."""

    ids: Tensor
    """[R, T] token ids. A trie is one row with parents before children."""
    mask: Tensor
    """Boolean attention mask.

    - Trie: [1, 1, T, T], True if the row's token may attend to the column's token.
    - Padded rows: [R, T], False on padding.
    """
    positions: Tensor | None
    """[1, T] depth of each token of a trie; None for padded rows."""
    logit_positions: Tensor
    """[S] index in ids.flatten() of the token whose logits predict the target."""
    targets: Tensor
    """[S] labels."""
    row_count: Tensor
    """[R, T] float, number of examples that share a token; 0 on padding and after a row's last predictor."""
    label_index: Tensor
    """[S] index of the target among the labels of its example."""
    row_index: Tensor
    """[S] number that identifies the target's example; it increases with the example's index in the micro-batch."""

    @property
    def is_filler(self) -> bool:
        """True for a pack without a label, whose pass only keeps the ranks of a sharded model in step."""
        return not len(self.targets)

    @property
    def token_count(self) -> Tensor:
        """[R, T] float, 1 for each token, padding included; 0 for a filler."""
        return torch.full_like(self.row_count, not self.is_filler)

    def to(self, device: torch.device | str, **kwargs: object) -> "Pack":
        """Return a copy of the pack on another device. Lightning's batch transfer calls it."""

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, **kwargs)  # type: ignore[arg-type]

        positions = None if self.positions is None else moved(self.positions)
        return Pack(
            moved(self.ids),
            moved(self.mask),
            positions,
            moved(self.logit_positions),
            moved(self.targets),
            moved(self.row_count),
            moved(self.label_index),
            moved(self.row_index),
        )


Packing = Callable[[Iterable[Example]], list[Pack]]
"""`pack` or `pad`: returns the packs of a micro-batch, without the examples that have no supervised token."""


def pack(examples: Iterable[Example]) -> list[Pack]:
    """Return tries of examples that are adjacent in sorted order.

    A new trie begins when adding an example would cost more than a separate trie, or exceed `MAX_PACK_TOKENS`.
    """
    packs: list[Pack] = []
    trie = _Trie()
    for row, example in sorted(enumerate(examples), key=lambda item: item[1].ids):
        if not example.supervised:
            continue
        size = len(trie.ids) + trie.new_tokens(example)
        if trie.ids and (size > MAX_PACK_TOKENS or _cost(size) - _cost(len(trie.ids)) > _cost(example.length)):
            packs.append(trie.pack())
            trie = _Trie()
        trie.insert(example, row)
    if trie.ids:
        packs.append(trie.pack())
    return packs


def _cost(tokens: int) -> float:
    """Return the cost of a forward pass, in units of one token's matrix products."""
    return tokens + ATTENTION_COST * tokens * tokens


class _Trie:
    """Trie under construction; node i is the i-th inserted token."""

    def __init__(self) -> None:
        self.children: dict[tuple[int, int], int] = {}
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.logit_positions: list[int] = []
        self.targets: list[int] = []
        self.row_count: list[int] = []
        self.label_index: list[int] = []
        self.row_index: list[int] = []

    def new_tokens(self, example: Example) -> int:
        """Return the number of nodes that inserting `example` would add."""
        node, length = -1, example.length
        for depth in range(length):
            child = self.children.get((node, example.ids[depth]))
            if child is None:
                return length - depth
            node = child
        return 0

    def insert(self, example: Example, row: int) -> None:
        node, label_index, length = -1, 0, example.length
        for depth in range(length + 1):
            label = example.labels[depth]
            if label != IGNORED and depth > 0:
                self.logit_positions.append(node)
                self.targets.append(label)
                self.label_index.append(label_index)
                self.row_index.append(row)
                label_index += 1
            if depth < length:
                node = self._get_or_add_child(node, example.ids[depth], depth)
                self.row_count[node] += 1

    def _get_or_add_child(self, parent: int, token: int, depth: int) -> int:
        child = self.children.get((parent, token))
        if child is None:
            child = self.children[parent, token] = len(self.ids)
            self.ids.append(token)
            self.parents.append(parent)
            self.depths.append(depth)
            self.row_count.append(0)
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
            logit_positions=torch.tensor(self.logit_positions),
            targets=torch.tensor(self.targets),
            row_count=torch.tensor([self.row_count], dtype=torch.float32),
            label_index=torch.tensor(self.label_index),
            row_index=torch.tensor(self.row_index),
        )


def pad(examples: Iterable[Example]) -> list[Pack]:
    """Return one pack with a row for each supervised example, padded on the right; `[]` without any."""
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
    return [pack_padded(ids, mask, labels)]


def fill_up(micro_batches: Sequence[Sequence[list[Pack]]], rank: int) -> list[list[Pack]]:
    """Return a rank's micro-batches with as many packs as the rank with the most has in each of them.

    A pass of a sharded model gathers weights from all ranks, so that all must make the same passes. A filler has a
    token and no label. It comes last in its micro-batch, and adds zeros to loss and gradient.

    Args:
        micro_batches: packs of each micro-batch of every rank.
        rank: index of this rank.
    """
    of_rank = [*micro_batches[rank]]
    counts = [max(map(len, packs)) for packs in zip_longest(*micro_batches, fillvalue=[])]
    more: Sequence[list[Pack]] = [[]] * (len(counts) - len(of_rank))
    filled = zip([*of_rank, *more], counts, strict=True)
    return [[*packs, *(_filler() for _ in range(count - len(packs)))] for packs, count in filled]


def _filler() -> Pack:
    ids, mask = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool)
    return pack_padded(ids, mask, torch.full_like(ids, IGNORED))


def pack_padded(ids: Tensor, mask: Tensor, labels: Tensor) -> Pack:
    """Return the pack of padded rows.

    Args:
        ids: [R, T] token ids.
        mask: [R, T] bool, False on padding.
        labels: [R, T] labels, `IGNORED` at tokens that are not learnt.
    """
    supervised = labels[:, 1:] != IGNORED
    row, column = supervised.nonzero(as_tuple=True)
    label_index = (supervised.cumsum(1) - 1)[row, column]
    logit_positions = row * ids.shape[1] + column
    # A token is needed up to the predictor of its row's last label.
    needed = torch.zeros_like(mask)
    needed[:, :-1] = supervised.flip(1).cumsum(1).flip(1) > 0
    return Pack(ids, mask, None, logit_positions, labels[row, column + 1], (needed & mask).float(), label_index, row)
