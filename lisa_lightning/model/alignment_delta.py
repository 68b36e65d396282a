"""What aligning changed in a linear layer, and the map C built of it that Safe LoRA and AsFT hold a fine-tuning to."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor

from lisa_lightning.model.lora import PREFIX
from lisa_lightning.runtime.errors import UserError


@final
class Delta:
    """V = W_aligned - W_base of one linear layer, [d_out, d_in], as C = V V^T / ||V||_F needs it (Safe LoRA).

    C is no projector: its largest eigenvalue is sigma_1^2 / ||V||_F, so it grows with V and rescales what it is applied
    to. It is symmetric and nowhere negative.

    V V^T and ||V||_F are all that is used of V, and a root says both: any R with R R^T = V V^T. Where V = left @ right
    has rank r, a root has r columns. Llama-2-7B with r = 16 on q_proj and v_proj, 64 modules of 4096 x 4096, float32:
    roots take 64 * 4096 * 16 * 4 B = 16 MiB (on all seven kinds of layer 83 MiB); dense V or C, as in the official
    code, 64 * 4096^2 * 4 B = 4 GiB (and a C of up_proj or gate_proj 11008^2 * 4 B = 462 MiB each).

    Args:
        root: [d_out, k] float32; V itself is one, and is what a dense delta keeps.
    """

    def __init__(self, root: Tensor) -> None:
        self.root = root
        self.norm: Tensor = root.norm()
        """||V||_F, a scalar."""

    @classmethod
    def low_rank(cls, left: Tensor, right: Tensor) -> "Delta":
        """V = left @ right, of [d_out, r] and [r, d_in]."""
        return cls(compressed(left, right))

    def project(self, x: Tensor) -> Tensor:
        """C x of x, [d_out, n] float32, through products with k columns; differentiable in x.

        left (right right^T) (left^T x) / ||V||_F, where V is of low rank.
        """
        return self.root @ (self.root.T @ x) / self.norm

    def to(self, device: torch.device | str) -> "Delta":
        """The same on another device."""
        return Delta(self.root.to(device))


def compressed(left: Tensor, right: Tensor) -> Tensor:
    """left @ right without its row space: R, [d_out, min(r, d_in)] float32, with R = left @ right @ Q, Q orthonormal.

    R has the Gram matrix, the Frobenius norm and, for any C, the products <C V, V> of V = left @ right. By a QR
    decomposition, since a product of Gram matrices loses half of the digits where factors cancel.
    """
    upper = torch.linalg.qr(right.float().T, mode="r").R
    return left.float() @ upper.T


def low_rank_deltas(folder: Path) -> dict[str, Delta]:
    """The deltas of all modules that an alignment adapter changed, by name (`model.layers.0.self_attn.q_proj`).

    V = alpha/r * B A, in float32: what merging the adapter adds, before it is rounded to the weights' precision.

    Args:
        folder: of a peft adapter: adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: there is no such adapter, or one that isn't alpha/r * B A alone.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no adapter: {Path(error.filename or folder).name} is missing") from error
    for key in ("use_dora", "alpha_pattern"):
        if config.get(key):
            raise UserError(f"{folder}: what aligning changed can't be told from an adapter with {key}={config[key]}")
    deltas = {}
    for name, a in weights.items():
        if name.endswith(".lora_A.weight"):
            rank = a.shape[0]
            scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            module = name.removesuffix(".lora_A.weight").removeprefix(PREFIX)
            deltas[module] = Delta.low_rank(scale * b.float(), a)
    return {module: delta for module, delta in deltas.items() if delta.norm > 0}  # else C is 0/0


def changed(deltas: Mapping[str, Delta], modules: Iterable[str]) -> dict[str, Delta]:
    """The deltas of those of `modules` that aligning changed, in their order.

    Raises:
        UserError: it changed none of them.
    """
    names = list(modules)
    found = {name: deltas[name] for name in names if name in deltas}
    if not found:
        there = sorted({name.rpartition(".")[2] for name in deltas})
        own = sorted({name.rpartition(".")[2] for name in names})
        raise UserError(
            f"aligning changed none of the modules that are fine-tuned ({', '.join(own)}); it changed "
            f"{', '.join(there) or 'nothing'}: see align.lora.targets and lora.targets"
        )
    return found
