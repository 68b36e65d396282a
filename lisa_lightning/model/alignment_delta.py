"""The weight change of alignment in a linear layer: `Delta`, with the map C of Safe LoRA and AsFT.

Start at `low_rank_deltas`, which reads the changes from an alignment adapter, or `dense_deltas` for two models.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from lisa_lightning.model.factors import PREFIX, Factors
from lisa_lightning.runtime.errors import UserError


@final
class Delta:
    """V = W_aligned - W_base of one linear layer, [d_out, d_in], for the map C = V V^T / ||V||_F (Safe LoRA).

    C is no projector. Its largest eigenvalue is sigma_1^2 / ||V||_F, so it grows with V and rescales its input. It is
    symmetric and positive semidefinite.

    V is needed only through V V^T and ||V||_F. Any root R with R R^T = V V^T determines both. A root of V = left @
    right of rank r has r columns.

    Memory for Llama-2-7B with r = 16 on q_proj and v_proj (64 modules of 4096 x 4096, float32):
        - roots: 64 * 4096 * 16 * 4 B = 16 MiB, or 83 MiB on all seven kinds of layer
        - dense V or C, as in the official code: 64 * 4096^2 * 4 B = 4 GiB, and 11008^2 * 4 B = 462 MiB for each C of
          up_proj or gate_proj

    Args:
        root: [d_out, k] float32. For a dense delta it is V itself.
    """

    def __init__(self, root: Tensor) -> None:
        self.root = root
        self.norm: Tensor = root.norm()
        """||V||_F, a scalar."""

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor) -> "Delta":
        """Return the delta V = left @ right of `left` [d_out, r] and `right` [r, d_in]."""
        return cls(compress(left, right))

    def project(self, x: Tensor) -> Tensor:
        """Return C x, [d_out, n] float32, of `x` [d_out, n]. It is differentiable in `x`.

        For V of low rank it is left (right right^T) (left^T x) / ||V||_F, computed by products with k columns.
        """
        return self.root @ (self.root.T @ x) / self.norm

    def to(self, device: torch.device | str) -> "Delta":
        """Return a copy on another device."""
        return Delta(self.root.to(device))


def compress(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right without its row space: R = left @ right @ Q with orthonormal Q.

    R has the Gram matrix and the Frobenius norm of V = left @ right. For any C it also has the inner product <C V, V>.
    A QR decomposition is used, because a product of Gram matrices loses half of the digits where factors cancel.

    Args:
        left: [d_out, r].
        right: [r, d_in].

    Returns:
        [d_out, min(r, d_in)] float32.
    """
    upper = torch.linalg.qr(right.float().T, mode="r").R
    return left.float() @ upper.T


def low_rank_deltas(folder: Path) -> dict[str, Delta]:
    """Return the deltas of all linear layers that an alignment adapter changed.

    Args:
        folder: folder of a peft adapter.

    Returns:
        Deltas by name of the module, such as `model.layers.0.self_attn.q_proj`.

    Raises:
        UserError: as in `low_rank_updates`.
    """
    deltas = {module: Delta.low_rank(*update) for module, update in low_rank_updates(folder).items()}
    # For V = 0, C would be 0/0.
    return {module: delta for module, delta in deltas.items() if delta.norm > 0}


def dense_deltas(net: Any, base: Any, names: Iterable[str]) -> dict[str, Delta]:
    """Return the deltas of the linear layers in which the model under an adapter differs from another model.

    Args:
        net: a `PeftModel`, whose frozen weights are those of the aligned model.
        base: the model before alignment, of the same architecture.
        names: names of adapted modules.

    Returns:
        Deltas of full rank by name of the module.

    Raises:
        UserError: if the models differ in these layers' names or shapes.
    """
    names = list(names)
    refuse_other_layers(net, base, names)
    deltas = {}
    for name in names:
        layer = net.get_submodule(PREFIX + name)
        aligned, initial = layer.get_base_layer().weight.detach(), base.get_submodule(name).weight.detach()
        change = aligned.float() - initial.to(aligned.device).float()
        deltas[name] = Delta(change.T if layer.fan_in_fan_out else change)
    # For V = 0, C would be 0/0.
    return {module: delta for module, delta in deltas.items() if delta.norm > 0}


def refuse_other_layers(net: Any, base: Any, names: Iterable[str]) -> None:
    """Check that the model before alignment has the adapted layers of the aligned model. Weights are not read.

    Args:
        net: a `PeftModel`, whose frozen weights are those of the aligned model.
        base: the model before alignment.
        names: names of adapted modules.

    Raises:
        UserError: if a layer is missing or has another shape.
    """
    layers = dict(base.named_modules())
    for name in names:
        shape = tuple(net.get_submodule(PREFIX + name).get_base_layer().weight.shape)
        initial = tuple(layers[name].weight.shape) if name in layers else "no such layer"
        if shape != initial:
            raise UserError(
                f"The aligned model has {name} of shape {shape}, and the model before alignment {initial}. "
                "Fix: name the model that was aligned"
            )


def alignment_factors(folder: Path, scaling: float) -> Factors:
    """Return the factors of an alignment adapter, whose alpha/r becomes `scaling`.

    Args:
        folder: folder of a peft adapter.
        scaling: alpha/r of the adapter that the factors will be used with. B is multiplied to fit it.

    Raises:
        UserError: as in `low_rank_updates`.
    """
    factors: Factors = {}
    for module, (left, right) in low_rank_updates(folder).items():
        factors[f"{PREFIX}{module}.lora_A.default.weight"] = right
        factors[f"{PREFIX}{module}.lora_B.default.weight"] = left / scaling
    return factors


def low_rank_updates(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the update V of each linear layer that an alignment adapter adapts, as two factors.

    V = alpha/r * B A, in float32. Merging the adapter adds V, before rounding to the precision of the weights.

    Args:
        folder: folder of a peft adapter, with adapter_config.json and adapter_model.safetensors.

    Returns:
        `left` [d_out, r], which is alpha/r * B, and `right` [r, d_in], which is A, by name of the module.

    Raises:
        UserError: if there is no such adapter, or if it is not of the form alpha/r * B A.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no adapter: {Path(error.filename or folder).name} is missing") from error
    for key in ("use_dora", "alpha_pattern"):
        if config.get(key):
            raise UserError(
                f"{folder}: the alignment update can't be computed from an adapter with {key}={config[key]}. "
                "Fix: align with a plain LoRA adapter"
            )
    updates = {}
    for name, a in weights.items():
        if name.endswith(".lora_A.weight"):
            rank = a.shape[0]
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            module = name.removesuffix(".lora_A.weight").removeprefix(PREFIX)
            updates[module] = (scale * b.float(), a.float())
    return updates


def matching_deltas(deltas: Mapping[str, Delta], modules: Iterable[str]) -> dict[str, Delta]:
    """Return the deltas of those `modules` that alignment changed, in the order of `modules`.

    Raises:
        UserError: if alignment changed none of them.
    """
    names = list(modules)
    matching = {name: deltas[name] for name in names if name in deltas}
    if not matching:
        aligned_types = sorted({name.rpartition(".")[2] for name in deltas})
        tuned_types = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"aligning changed none of the modules that are fine-tuned ({', '.join(tuned_types)}); it changed "
            f"{', '.join(aligned_types) or 'nothing'}. Fix: set align.lora.targets and lora.targets to common modules"
        )
    return matching
