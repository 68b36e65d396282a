"""The packed loss against the model's own `labels=` loss on the padded batch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lisa_lightning.loss import IGNORED, Example, completion_loss, pack
from lisa_lightning.net import attach, load, trainable

LORA = SimpleNamespace(r=4, alpha=8, dropout=0.0, targets="all-linear")


def example(prompt: str, answer: str) -> Example:
    prefix, target = [3 + b for b in prompt.encode()], [3 + b for b in answer.encode()] + [0]
    return Example(tuple(prefix + target), tuple([IGNORED] * len(prefix) + target))


BATCHES = {
    "shared prefix": [example("the same opening: " + x, y) for x, y in (("a b", "yes"), ("a c", "no"), ("zz", "yes"))],
    "mixed templates": [example("one", "x"), example("quite another beginning", "long answer"), example("o", "")],
    "one row": [example("alone", "here")],
    "one token": [example("", ""), example("p", "q")],
    "equal rows": [example("twice", "told")] * 2,
    "answer within another's prompt": [example("abcdef", "g"), example("abc", "defgh")],
    "no label left": [Example((5, 6, 7), (IGNORED,) * 3), example("a", "b")],
}


def reference(net: torch.nn.Module, rows: list[Example]) -> tuple[Tensor, int]:
    """What a Trainer does: pad, full logits, the model's own loss (a mean)."""
    ids = pad_sequence([torch.tensor(r.ids) for r in rows], batch_first=True, padding_value=1)
    labels = pad_sequence([torch.tensor(r.labels) for r in rows], batch_first=True, padding_value=IGNORED)
    mask = pad_sequence([torch.ones(len(r.ids), dtype=torch.long) for r in rows], batch_first=True)
    return net(input_ids=ids, attention_mask=mask, labels=labels).loss, int((labels[:, 1:] != IGNORED).sum())


@pytest.mark.parametrize("limit", [1, 24, 768])
@pytest.mark.parametrize("name", BATCHES)
def test_equals_the_models_own_loss(tiny: Path, name: str, limit: int) -> None:
    rows = BATCHES[name]
    net = attach(load(tiny, "float32"), LORA, seed=0)
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.normal_(std=0.3)
    wanted, tokens = reference(net, rows)
    wanted.backward()
    gradients = {n: w.grad.clone() for n, w in trainable(net).items() if w.grad is not None}
    net.zero_grad()

    assert tokens == sum(r.supervised for r in rows)
    found = completion_loss(net.get_base_model(), pack(rows, limit)) / tokens
    found.backward()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    for n, w in trainable(net).items():
        assert w.grad is not None
        assert (w.grad - gradients[n]).norm() <= 1e-4 * gradients[n].norm() + 1e-8


def test_shared_prefixes_stand_once() -> None:
    rows = BATCHES["shared prefix"]
    (packed,) = pack(rows)
    assert packed.ids.shape[1] < max(len(r.ids) for r in rows) + sum(len(r.ids) - 18 for r in rows)
    assert packed.mask.diagonal(dim1=-2, dim2=-1).all()


def test_packs_respect_the_limit_and_keep_every_row() -> None:
    rows = [example(f"{i} row", "answer") for i in range(20)]
    packs = pack(rows, limit=40)
    assert all(p.ids.shape[1] <= 40 for p in packs)
    assert sum(len(p.targets) for p in packs) == sum(r.supervised for r in rows)


def test_nothing_to_learn_gives_no_pack() -> None:
    assert pack([Example((5, 6), (IGNORED, IGNORED)), Example((5,), (5,))]) == []
