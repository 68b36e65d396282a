"""Where a model's attention and MLP blocks are, told by its structure, for methods that look at their outputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lisa_lightning.runtime.errors import UserError

ATTENTION = ("attn", "attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
NORMS = ("norm", "ln_")
BESIDE = (*NORMS, "dropout")
"""In the names of modules beside a block that are called after it."""


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers: the one list of as many modules as the config says, with attention in some of them.

    Raises:
        UserError: there is none.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    for found in lists:
        if any(any(_child(layer, ATTENTION)) for layer in found):
            return list(found)
    raise UserError(
        f"{type(model).__name__} has no list of {count} layers with attention in them that a hook could find"
    )


def attention_blocks(model: Any) -> list[nn.Module]:
    """Each layer's attention block, whose output is added to the residual stream.

    Raises:
        UserError: a layer has none.
    """
    return [_only(layer, ATTENTION, "attention") for layer in decoder_layers(model)]


def mlp_blocks(model: Any) -> list[nn.Module]:
    """Each layer's MLP block; where a layer holds its linear maps itself (OPT), the last of them.

    Raises:
        UserError: a layer has none.
    """
    found = []
    for layer in decoder_layers(model):
        linear = [m for m in layer.children() if _is_linear(m)]
        found.append(
            linear[-1] if linear and not any(_child(layer, FEED_FORWARD)) else _only(layer, FEED_FORWARD, "MLP")
        )
    return found


def final_norm(model: Any) -> nn.Module:
    """What the last layer's output goes through before the unembedding.

    Raises:
        UserError: there is no such module beside the layers.
    """
    layers = decoder_layers(model)
    for module in model.modules():
        if any(isinstance(m, nn.ModuleList) and len(m) == len(layers) and m[0] is layers[0] for m in module.children()):
            found = [m for name, m in module.named_children() if any(n in name.lower() for n in NORMS)]
            if found:
                return found[-1]
    raise UserError(f"{type(model).__name__} has no final norm beside its layers")


def _child(layer: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    for name, module in layer.named_children():
        if any(n in name.lower() for n in names) and not any(n in name.lower() for n in BESIDE):
            yield module


def _only(layer: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    found = list(_child(layer, names))
    if len(found) != 1:
        there = ", ".join(name for name, _ in layer.named_children())
        raise UserError(
            f"{type(layer).__name__} has {len(found)} {what} blocks, where one is needed; it holds: {there}"
        )
    return found[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


@contextmanager
def outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The outputs of these blocks in the passes within, in the order in which they came.

    A block whose output is a tuple gives its first element.
    """
    found: list[Tensor] = []
    with hooked(blocks, lambda _, out: found.append(_first(out))):
        yield found


@contextmanager
def probed(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Adds zeros to each block's output in the passes within: their gradient is that of the output.

    (Those themselves need not have a gradient: none does below the first adapter.)
    """
    found: list[Tensor] = []

    def hook(_: int, out: Any) -> Any:
        found.append(torch.zeros_like(_first(out), requires_grad=True))
        return _added(out, found[-1])

    with hooked(blocks, hook):
        yield found


@contextmanager
def perturbed(blocks: Sequence[nn.Module], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Add a constant to the output of each of these blocks in the pass within."""
    with hooked(blocks, lambda i, out: _added(out, offsets[i])):
        yield


@contextmanager
def hooked(blocks: Sequence[nn.Module], hook: Callable[[int, Any], Any]) -> Iterator[None]:
    """Call `hook` with a block's place and output; what it returns, unless None, takes the output's place."""
    handles = [
        block.register_forward_hook(lambda _, __, out, place=place: hook(place, out))
        for place, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipped(blocks: Sequence[nn.Module], out: Any) -> Iterator[None]:
    """Each of these blocks computes nothing in the pass within, and gives `out`, which need not be a tensor."""
    forwards = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: out
        yield
    finally:
        for block, forward in forwards:
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _added(out: Any, offset: Tensor) -> Any:
    moved = _first(out) + offset.to(_first(out).dtype)
    return (moved, *out[1:]) if isinstance(out, tuple) else moved
