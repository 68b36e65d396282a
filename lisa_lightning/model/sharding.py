"""Frozen weights of a model in shards over the devices: `shard`, `shard_merged`, and `is_sharded`.

Each device holds 1/N of the attention and MLP block of every layer. FSDP2 gathers the weights of a block for its
forward and backward pass, and frees them afterwards. Gathering computes nothing, so the results are those of whole
weights, bit for bit. Adapters that are attached later, embeddings, norms and the unembedding are whole everywhere.

Blocks are sharded rather than layers or the model, for two reasons:

- Methods call parts of a model. RepNoise unembeds the states of every depth, with weights that a sharded model frees.
- FSDP2 passes the inputs of what it shards through a function of its own. Around a layer it would change the order in
  which the gradients of the residual stream are added.
"""

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from lisa_lightning.model.hooks import decoder_layers


def shard(model: Any, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of each decoder layer of `model`, which must have no adapter yet.

    Every rank must call it.

    Args:
        model: a causal language model of `transformers`, whose weights are equal on all ranks.
        mesh: the devices, of one dimension.

    Raises:
        UserError: if the model has no list of decoder layers.
    """
    for layer in decoder_layers(model):
        _shard_blocks(layer, mesh)


def shard_merged(model: Any, mesh: DeviceMesh) -> Any:
    """Return a model with its adapter merged and its layers sharded, one layer after the other.

    Merging copies weights, and no more than one layer is whole in memory. The weights are those of peft's
    `merge_and_unload`, bit for bit. Every rank must call it.

    Args:
        model: a model with or without an adapter. It must not be used afterwards.
        mesh: the devices, of one dimension.
    """
    for layer in decoder_layers(model):
        _merge_below(layer)
        _shard_blocks(layer, mesh)
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def whole(weight: Tensor) -> Tensor:
    """Return a weight gathered from all ranks, which must call it at the same time; a whole weight unchanged."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _shard_blocks(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the parts of a layer that have a matrix."""
    for block in layer.children():
        if any(weight.ndim > 1 for weight in block.parameters()):
            # By default FSDP2 keeps the weights of a root, which each block is, until the backward pass.
            fully_shard(block, mesh=mesh, reshard_after_forward=True)


def _merge_below(layer: nn.Module) -> None:
    """Replace the adapted modules of a layer by their merged ones."""
    for name, module in [*layer.named_modules()]:
        if isinstance(module, LoraLayer):
            module.merge()
            layer.set_submodule(name, module.get_base_layer())


def is_sharded(model: nn.Module) -> bool:
    """Return whether a part of the model is in shards, so that every rank must make the same passes."""
    return any(isinstance(module, FSDPModule) for module in model.modules())
