"""LoRA factors of a model: `modules` returns their names, `trainable` the weights, `stack` the sum of two adapters."""

from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import Tensor

PREFIX: Final = "base_model.model."
"""Prefix that peft adds to the name of a module."""
Factors = dict[str, Tensor]
"""An adapter's A [r, d_in] and B [d_out, r], by parameter name, in any order. Such a name is
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight`."""


def modules(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return the names of the factors A and B of every adapted module.

    Args:
        names: names of weights of a model with an adapter.

    Returns:
        Names of A and B, by the module's name in the model without adapter.
    """
    return {
        name.partition(".lora_A.")[0].removeprefix(PREFIX): (name, name.replace(".lora_A.", ".lora_B."))
        for name in names
        if ".lora_A." in name
    }


def adapted_embeddings(names: Iterable[str]) -> list[str]:
    """Return the embeddings that have an adapter, without their path, such as `embed_tokens`.

    Args:
        names: names of weights of an adapter.
    """
    every = set(names)
    linear = {name for pair in modules(every).values() for name in pair}
    return [name.partition(".lora_")[0].rpartition(".")[2] for name in sorted(every - linear)]


def stack(first: Factors, second: Factors) -> Factors:
    """Return the adapter whose update is the sum of the updates of two adapters with the same alpha/r.

        B A + B' A' = [B, B'] [A; A']

    Args:
        first: an adapter of rank r, of linear layers.
        second: an adapter of rank r', of linear layers. Its modules may be others.

    Returns:
        Factors of rank r + r' for the modules of both adapters. For a module that an adapter lacks, its part is zero.
    """
    stacked: Factors = {}
    for a, b in (modules(first) | modules(second)).values():
        present = first if a in first else second
        for name, axis in ((a, 0), (b, 1)):
            parts = [f[name] if name in f else _zeros_like(present[name], axis, _rank(f)) for f in (first, second)]
            stacked[name] = torch.cat(parts, axis)
    return stacked


def _zeros_like(factor: Tensor, axis: int, rank: int) -> Tensor:
    """Return zeros of the shape of a factor, but with another rank, the size of `axis`."""
    shape = list(factor.shape)
    shape[axis] = rank
    return factor.new_zeros(shape)


def _rank(factors: Factors) -> int:
    return next((len(factors[a]) for a, _ in modules(factors).values()), 0)


def causal_model(net: Any) -> Any:
    """Return the causal language model of transformers in a `PeftModel`, or `net` itself if it has no adapter."""
    return net.get_base_model() if hasattr(net, "get_base_model") else net


def trainable(net: torch.nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights by name, in a fixed order."""
    return {name: weight for name, weight in net.named_parameters() if weight.requires_grad}


def on_device(device: torch.device, factors: Factors) -> Factors:
    """Return the factors on a device."""
    return {name: weight.to(device) for name, weight in factors.items()}
