"""Decoder layers, attention and MLP blocks of a model, found by its structure, and hooks on their outputs.

Start at `mlp_blocks` and `capture_outputs`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from lisa_lightning.runtime.errors import UserError

ATTENTION = ("attn", "attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn")
NORMS = ("norm", "ln_")
NON_BLOCKS = (*NORMS, "dropout")
"""Parts of the names of modules that belong to a block, but are no block."""
Hook = Callable[[int, Any], Any]
"""Index of a block, its output -> the new output, or None to leave it unchanged."""

# Global rather than of a thread, since a GPU's backward pass runs in another thread while this one waits.
_changes: list[tuple[Sequence[nn.Module], Hook]] = []
"""Blocks whose outputs change in the current forward pass, and the hook that changes them."""
_is_recomputing = False
"""Tells whether a backward pass repeats a forward pass."""


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the decoder layers.

    They are the list of as many modules as the config says, some of which hold an attention block.

    Raises:
        UserError: if there is no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    candidates = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    for layers in candidates:
        if any(any(_matching_children(layer, ATTENTION)) for layer in layers):
            return list(layers)
    raise UserError(
        f"{type(model).__name__} has no list of {count} layers with attention in them that a hook could find. "
        "Fix: choose another model or method"
    )


def layer_of_parameters(model: Any) -> dict[str, int]:
    """Return the index of the decoder layer of each parameter. Parameters outside the layers have no entry.

    Raises:
        UserError: if the model has no list of layers.
    """
    indices = {id(w): i for i, layer in enumerate(decoder_layers(model)) for w in layer.parameters()}
    return {name: indices[id(w)] for name, w in model.named_parameters() if id(w) in indices}


def attention_blocks(model: Any) -> list[nn.Module]:
    """Return the attention block of each layer, whose output is added to the residual stream.

    Raises:
        UserError: if a layer has no attention block, or several.
    """
    return [_single_child(layer, ATTENTION, "attention") for layer in decoder_layers(model)]


def mlp_blocks(model: Any) -> list[nn.Module]:
    """Return the MLP block of each layer, or its last linear map if the layer has these as direct children (OPT).

    Raises:
        UserError: if a layer has no MLP block, or several.
    """
    blocks = []
    for layer in decoder_layers(model):
        linear = [m for m in layer.children() if _is_linear(m)]
        has_block = any(_matching_children(layer, FEED_FORWARD))
        blocks.append(linear[-1] if linear and not has_block else _single_child(layer, FEED_FORWARD, "MLP"))
    return blocks


def final_norm(model: Any) -> nn.Module:
    """Return the norm between the last layer and the unembedding.

    Raises:
        UserError: if there is no norm next to the layers.
    """
    layers = decoder_layers(model)
    for module in model.modules():
        if any(isinstance(m, nn.ModuleList) and len(m) == len(layers) and m[0] is layers[0] for m in module.children()):
            norms = [m for name, m in module.named_children() if any(n in name.lower() for n in NORMS)]
            if norms:
                return norms[-1]
    raise UserError(f"{type(model).__name__} has no final norm next to its layers. Fix: choose another model or method")


def attention_window(model: Any) -> int | None:
    """Return the smallest attention window of all layers, in tokens. None if no layer has a window."""
    config = model.config.get_text_config()
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [getattr(config, name, None) for name in names]
    return min((w for w in windows if isinstance(w, int)), default=None)


def _matching_children(layer: nn.Module, patterns: Sequence[str]) -> Iterator[nn.Module]:
    for name, module in layer.named_children():
        if any(p in name.lower() for p in patterns) and not any(p in name.lower() for p in NON_BLOCKS):
            yield module


def _single_child(layer: nn.Module, patterns: Sequence[str], kind: str) -> nn.Module:
    blocks = list(_matching_children(layer, patterns))
    if len(blocks) != 1:
        children = ", ".join(name for name, _ in layer.named_children())
        raise UserError(
            f"{type(layer).__name__} has {len(blocks)} {kind} blocks, where one is needed; it holds: {children}. "
            "Fix: choose another model or method"
        )
    return blocks[0]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


@contextmanager
def capture_outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that collects the outputs of `blocks`, in the order of computation.

    If an output is a tuple, the list gets its first element.
    """
    outputs: list[Tensor] = []
    with forward_hooks(blocks, lambda _, output: outputs.append(_hidden(output))):
        yield outputs


@contextmanager
def output_probes(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Add zeros to each block's output and yield these zeros. Their gradient equals the gradient of the output.

    The outputs themselves may have no gradient, as below the first adapter.
    """
    probes: list[Tensor] = []

    def hook(_: int, output: Any) -> Any:
        probes.append(torch.zeros_like(_hidden(output), requires_grad=True))
        return _shifted(output, probes[-1])

    with forward_hooks(blocks, hook):
        yield probes


@contextmanager
def add_to_outputs(blocks: Sequence[nn.Module], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Add `offsets[i]` to every output of `blocks[i]`, also where a backward pass computes an output again."""

    def hook(index: int, output: Any) -> Any:
        return _shifted(output, offsets[index])

    _changes.append((blocks, hook))
    try:
        with forward_hooks(blocks, hook):
            yield
    finally:
        _changes.pop()


@contextmanager
def forward_hooks(blocks: Sequence[nn.Module], hook: Hook) -> Iterator[None]:
    """Call `hook(index, output)` after the forward pass of each block, but not when a backward pass repeats it.

    Args:
        blocks: modules to hook.
        hook: returns the new output, or None to leave the output unchanged.
    """
    with _registered(blocks, lambda index, output: None if _is_recomputing else hook(index, output)):
        yield


@contextmanager
def _registered(blocks: Sequence[nn.Module], hook: Hook) -> Iterator[None]:
    handles = [
        block.register_forward_hook(lambda _, __, output, index=index: hook(index, output))
        for index, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@final
class Recomputation:
    """Context in which layers repeat the forward pass that created it. Each backward pass enters it anew.

    Outputs change inside as in that forward pass. No other hook is called, so that nothing is captured twice.
    """

    def __init__(self) -> None:
        self._changes = tuple(_changes)
        self._registered = ExitStack()

    def __enter__(self) -> None:
        global _is_recomputing
        for blocks, hook in self._changes:
            self._registered.enter_context(_registered(blocks, hook))
        _is_recomputing = True

    def __exit__(self, *_: object) -> None:
        global _is_recomputing
        _is_recomputing = False
        self._registered.close()


@contextmanager
def skip_forward(blocks: Sequence[nn.Module], output: Any) -> Iterator[None]:
    """Let each block return `output`, of any type, without computing anything."""
    forwards = [(block, vars(block).get("forward")) for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = lambda *_, **__: output
        yield
    finally:
        for block, forward in forwards:
            if forward is None:
                vars(block).pop("forward", None)
            else:
                vars(block)["forward"] = forward


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _shifted(output: Any, offset: Tensor) -> Any:
    shifted = _hidden(output) + offset.to(_hidden(output).dtype)
    return (shifted, *output[1:]) if isinstance(output, tuple) else shifted
