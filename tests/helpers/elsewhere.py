"""Second device without hardware: tensors that report the device `meta`, while their numbers lie on the CPU.

An operation that mixes them with tensors of the CPU fails exactly if it would fail on a GPU. A run `elsewhere()` thus
shows whether everything was moved that must be. Its numbers are those of a run on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lisa_lightning.runtime import launch as processes

DEVICE = torch.device("meta")
aten = torch.ops.aten
MOVING = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Operations that take their indices from the CPU too."""


class There(Tensor):
    """Tensor on the other device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls: type["There"], numbers: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the inner tensor, so that a parameter that moves remains the same object, as on a GPU."""
        return ["numbers"], None

    @staticmethod
    def __tensor_unflatten__(found: dict[str, Tensor], *_: Any) -> "There":
        return There(found["numbers"])

    # What torch doesn't do for subclasses, or for lack of numbers not on `meta`

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __getitem__(self, at: Any) -> Tensor:
        return super().__getitem__(_listed(at))

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(_listed(at), value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.numbers.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Execute an operation on the device of its tensors."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(t.device == DEVICE and not isinstance(t, There) for t in tensors):
        raise AssertionError(f"{func} of a tensor that was made there without numbers")
    there = any(isinstance(t, There) for t in tensors)
    if there and func not in MOVING:
        own = (args[0], args[2:]) if func in INDEXED and isinstance(args[0], There) else (args, kwargs)
        here = [t for t in tree_leaves(own) if isinstance(t, Tensor) and not isinstance(t, There)]
        if any(t.dim() or func is aten.cat.default for t in here):
            raise AssertionError(f"{func} of tensors on two devices")
    wanted = kwargs.get("device")
    stays = there if wanted is None else torch.device(wanted) == DEVICE
    if stays and kwargs.get("generator") is not None:
        raise AssertionError(f"{func} there, drawn by a generator of the CPU")
    told = kwargs if wanted is None else {**kwargs, "device": torch.device("cpu")}
    inside = tree_map(lambda t: t.numbers if isinstance(t, There) else t, (args, told))
    found = func(*inside[0], **inside[1])
    if func._schema.name.endswith("_"):
        return found if found is None else args[0]
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, found) if stays else found


def _listed(at: Any) -> Any:
    return tuple(_listed(a) for a in at) if isinstance(at, tuple) else _tensor(at) if isinstance(at, list) else at


_tensor = torch.tensor


def _made(data: Any, *, device: Any = None, **rest: Any) -> Tensor:
    made = _tensor(data, **rest)
    return made if device is None else made.to(device)


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class _Fabric(Fabric):
    device = DEVICE  # type: ignore[assignment]


class _Trainer(L.Trainer):
    def __init__(self, **settings: Any) -> None:
        strategy = SingleDeviceStrategy(DEVICE, _Accelerator())
        super().__init__(**settings | {"accelerator": "auto", "strategy": strategy})


@contextmanager
def elsewhere() -> Iterator[None]:
    """Let runs of the pipeline within the context compute on the other device."""
    with (
        patch.object(processes, "Fabric", _Fabric),
        patch("lisa_lightning.pipeline.fit.L.Trainer", _Trainer),
        patch.object(torch, "tensor", _made),
        _Mode(),
    ):
        yield
