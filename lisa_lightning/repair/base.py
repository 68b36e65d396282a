"""What a repair is given and gives back, and the net's activations as repairs look at them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisa_lightning.config.requirements import Need
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.runtime.errors import UserError

Factors = dict[str, Tensor]
"""An adapter's A [r, d_in] and B [d_out, r], by the names that they have in the net, in any order:
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a repair may use. All but the factors is made when it is called for: no repair needs everything.

    alpha/r is not among it: no repair's result depends on it.
    """

    factors: Factors
    """The finished adapter."""
    net: Callable[[], Any]
    """The fine-tuned net, a `PeftModel`; which values its adapter has doesn't matter."""
    rows: Callable[[Stream], Iterable[Pack]]
    """All rows of a stream, padded."""
    deltas: Callable[[], Mapping[str, Delta]]
    """What aligning changed, by module."""
    reference: Callable[[], Factors]
    """A safe adapter with the same names and shapes."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What every repair gives back; each adds how it came to it."""

    factors: Factors
    """The repaired adapter. Tensors that the repair left alone are the given ones, not copies."""


class Repair(ABC):
    """A defense after fine-tuning."""

    needs: Set[Need] = frozenset()
    """What it can't do without."""

    def refuse(self, net: Any, deltas: Mapping[str, Delta]) -> None:  # noqa: B027 - most take any adapter
        """Called before anything is trained, with a net of the run's shape and what aligning changes in name.

        Raises:
            UserError: it can't be repaired so.
        """

    @abstractmethod
    def repair(self, given: Given) -> Repaired:
        """The repaired adapter. Neither the given factors nor the net are changed.

        Raises:
            UserError: what is given can't be repaired so.
        """


@contextmanager
def holding(net: Any, factors: Factors) -> Iterator[dict[str, Tensor]]:
    """The net in evaluation mode with these factors in place; afterwards it is what it was, bit for bit.

    Gives the net's own weights by name, so that they can be overwritten within.

    Raises:
        UserError: the net has no such factors.
    """
    weights = dict(net.named_parameters())
    for name, value in factors.items():
        if name not in weights or weights[name].shape != value.shape:
            raise UserError(f"the net has no {name} of shape {tuple(value.shape)}")
    own = {name: weights[name] for name in factors}
    kept = {name: w.detach().clone() for name, w in own.items()}
    training = net.training
    net.eval()
    try:
        write(own, factors)
        yield own
    finally:
        write(own, kept)
        net.train(training)


@torch.no_grad()
def write(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite the weights that `values` names."""
    for name, value in values.items():
        weights[name].copy_(value)


@torch.no_grad()
def observe(net: Any, factors: Iterable[str], packed: Pack, see: Callable[[str, Tensor], None], masked: bool) -> None:
    """Run padded rows through the net and hand `see` each of these factors' name and input, [R * T, columns].

    After the last of them the pass is broken off: the unembedding, a small model's dearest product, isn't needed.

    Args:
        masked: whether the model is told which tokens are padding.
    """
    assert packed.positions is None, "rows must be padded: a trie's tokens stand for several rows"
    waiting = set(factors)

    def hook(name: str, x: Tensor) -> None:
        see(name, x.flatten(0, -2))  # an architecture may have done so itself: OPT's MLP
        waiting.discard(name)
        if not waiting:
            raise _Enough

    handles = [
        net.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, inputs, name=name: hook(name, inputs[0])
        )
        for name in tuple(waiting)
    ]
    mask = {"attention_mask": packed.mask.long()} if masked else {}
    try:
        with suppress(_Enough):
            net(input_ids=packed.ids, use_cache=False, **mask)
    finally:
        for handle in handles:
            handle.remove()


class _Enough(Exception):
    """All has been seen."""
