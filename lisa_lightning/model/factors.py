"""Names of the LoRA factors A and B of a model: `modules`, and its trainable weights: `trainable`."""

from collections.abc import Iterable
from typing import Final

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


def trainable(net: torch.nn.Module) -> dict[str, Tensor]:
    """Return the trainable weights by name, in a fixed order."""
    return {name: weight for name, weight in net.named_parameters() if weight.requires_grad}
