"""Builds models of a footprint's shapes, and counts the bytes that a step of them keeps, as on a GPU."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.footprint import Lora, Step
from lisa_lightning.config.settings import Lora as LoraSettings
from lisa_lightning.data.packing import IGNORED, Example, pack
from lisa_lightning.model.lora import attach
from lisa_lightning.objective.loss import completion_loss


def adapted(model: Any, lora: Lora) -> Any:
    settings = LoraSettings(r=lora.r, alpha=4, dropout=0.1 if lora.dropout else 0.0, targets=list(lora.targets))
    return attach(model, settings, 0)


@contextmanager
def autocast_of_a_gpu() -> Iterator[None]:
    """Apply a CPU's autocast to bfloat16, with LayerNorm in float32 and dropout masks in bytes as on a GPU."""
    layer_norm = F.layer_norm
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):

        def in_float32(x: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return layer_norm(x.float(), shape, weight.float(), bias.float(), eps)

        patch.setattr(F, "layer_norm", in_float32)
        patch.setattr(
            F, "dropout", lambda x, p, training=True, inplace=False: torch.native_dropout(x, p, True)[0] if p else x
        )
        yield


def packs_of(step: Step, vocabulary: int) -> Any:
    """Return one trie for each pass of the step, of rows that share no prefix."""
    made = []
    for i in range(step.passes):
        ids = tuple((7 * i + j) % vocabulary for j in range(step.width + 1))
        learnt = step.supervised // step.passes
        made += pack([Example(ids, (IGNORED,) * (len(ids) - learnt) + ids[len(ids) - learnt :])])
    assert sum(p.ids.numel() for p in made) == step.tokens
    assert sum(len(p.targets) for p in made) == step.supervised
    return made


def saved_bytes(net: Any, step: Step) -> int:
    """Return the bytes that a forward pass keeps for the backward pass, without the weights."""
    weights = {w.untyped_storage().data_ptr() for w in net.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    packs = packs_of(step, net.config.vocab_size)
    with autocast_of_a_gpu(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        completion_loss(net.get_base_model(), packs).detach()
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)


class Live(TorchDispatchMode):
    """Counter of the bytes of all live tensors, and of their maximum so far."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.drop, place, size)

    def drop(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out
