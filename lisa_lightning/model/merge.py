"""Merge an adapter into the files of its base model one by one, without loading the model: `merge_files`."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from lisa_lightning.model.factors import PREFIX
from lisa_lightning.runtime.files import read_json, write_text

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
"""Names of the files of a model: one file with all weights, or an index of several."""


@torch.no_grad()
def merge_files(net: PeftModel, base: Path, dtype: str, out: Path) -> bool:
    """Write the base model with the adapter merged, W + alpha/r B A, and return whether that was possible.

    It is not if the files name a weight otherwise than the model, as older files of some architectures do. Memory for
    one file suffices. The weights are those of peft's `merge_and_unload`, bit for bit.

    Args:
        net: a model with an adapter. Its frozen weights are not read, so that they may be quantized or in shards.
        base: folder of the base model.
        dtype: data type of the written weights: float32, bfloat16 or float16.
        out: folder to write.
    """
    layers = {f"{name}.weight": layer for name, layer in lora_layers(net).items()}
    files = _weight_files(base)
    if layers.keys() - {name for file in files for name in _names(file)}:
        return False
    sizes = {file.name: _merge_file(file, layers, getattr(torch, dtype), out) for file in files}
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in _names(file)}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text(out / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    config.dtype = getattr(torch, dtype)
    config.save_pretrained(out)
    generation: Any = net.get_base_model().generation_config or GenerationConfig.from_model_config(config)
    generation.save_pretrained(out)
    return True


def lora_layers(net: Any) -> dict[str, LoraLayer]:
    """Return the adapted layers by their name in the model without adapter."""
    return {name.removeprefix(PREFIX): m for name, m in net.named_modules() if isinstance(m, LoraLayer)}


def _weight_files(base: Path) -> list[Path]:
    """Return the files with the weights of a model, of which transformers prefers a single one."""
    if (base / SINGLE).exists():
        return [base / SINGLE]
    return [base / name for name in sorted({*read_json(base / INDEX, "fetch the model again")["weight_map"].values()})]


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as weights:
        return list(weights.keys())


def _merge_file(file: Path, layers: dict[str, LoraLayer], dtype: torch.dtype, out: Path) -> int:
    """Write the weights of a file, merged, and return their number of bytes."""
    with safe_open(file, "pt") as weights:
        merged = {name: _merged(weights.get_tensor(name), layers.get(name), dtype) for name in weights.keys()}  # noqa: SIM118
    save_file(merged, out / file.name, {"format": "pt"})
    return sum(tensor.nbytes for tensor in merged.values())


def _merged(weight: Tensor, layer: Any, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype) if weight.is_floating_point() else weight
    if layer is not None:
        weight += layer.get_delta_weight("default").to(weight.device)
    return weight
