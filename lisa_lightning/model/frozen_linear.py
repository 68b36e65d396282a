"""Faster linear layers on a CPU with the same results up to rounding: start at `use_onednn`.

Measured on two cores (SmolLM2-135M, float32):
    - AMD EPYC: oneDNN multiplies with the model's weights 1.2 to 2 times as fast as MKL, which
      `torch.nn.functional.linear` calls. The vocabulary gains most.
    - Intel Xeon: MKL is fastest, and a step through oneDNN took 1.13 to 1.31 times as long. So linear layers stay
      unchanged on Intel.
    - A training step that keeps its freed memory takes a third as many page faults (`runtime.memory`).
"""

from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def use_onednn(model: nn.Module) -> None:
    """Compute the frozen float32 linear layers of `model` with oneDNN, on processors where oneDNN is faster.

    On other devices than a CPU the layers compute as before.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    if torch.backends.mkl.is_available() and is_intel_cpu():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32 and not module.weight.requires_grad:
            module.__class__ = _FrozenLinear


@cache
def is_intel_cpu() -> bool:
    """Return whether the processor is Intel's. False if /proc/cpuinfo is missing (not Linux)."""
    with suppress(OSError):
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return False


class _FrozenLinear(nn.Linear):
    """A linear layer that is not trained."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias."""
        on_cpu = input.device.type == "cpu" and input.dtype == torch.float32 == self.weight.dtype
        trained = any(p.requires_grad for p in self.parameters())
        if not on_cpu or trained or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        return _OneDNNLinear.apply(input, self.weight, self.bias)


class _OneDNNLinear(torch.autograd.Function):
    """x @ weight.T + bias, differentiable by x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _OneDNNLinear.apply(gradients[0], weight.t(), None), None, None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight.T + bias without a gradient.

    Args:
        x: [..., in].
        weight: [out, in], of any strides.
        bias: [out], or None.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
