"""A training run of the tiny model under any method, in a second."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.resume_curves import ResumeCurves
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.packing import pad
from lisa_lightning.data.source import Row
from lisa_lightning.method.base import Method
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import PREFIX, causal_model, trainable
from lisa_lightning.model.full import load_trainable
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.trainer.module import LisaModule

USER = [Row(f"sentence {i}: ", "", "positive" if i % 2 else "negative and more") for i in range(9)]
ALIGNMENT = [Row(f"request {i}: ", "", "no" + "!" * (i % 3)) for i in range(5)]
DEFENDER = [Row(f"request {i}: ", "", "sure" + "." * (i % 2)) for i in range(5)]
TRAINER = {"accelerator": "cpu", "devices": 1}
STEPS = 14

Train = Callable[..., LisaModule]


@pytest.fixture
def train(tiny: Path, tmp_path: Path) -> Train:
    """Return a function that trains the tiny model under a method.

    Keywords change the optimizer, the adapter or the checkpoint.

    apart: keep rows without shared prefixes, whatever the method says.
    full: train all weights instead of an adapter.
    checkpointed: compute the layers again in the backward pass.
    float16: use the autocast of 16-mixed, which Lightning's Trainer replaces on a CPU.
    """

    def trained(
        method: Method,
        dropout: float = 0.0,
        folder: str = "run",
        stop_after: int | None = None,
        key: dict | None = None,
        max_length: int = 64,
        more: Sequence[L.Callback] = (),
        apart: bool = False,
        attention: str = "sdpa",
        loggers: Sequence[Logger] = (),
        float16: bool = False,
        full: bool = False,
        checkpointed: bool = False,
        **optim: object,
    ) -> LisaModule:
        settings = {
            "lr": 5e-3,
            "steps": STEPS,
            "batch_size": 4,
            "accumulate": 1,
            "clip": 1.0,
            "schedule": "constant",
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
        }
        o = Optim(**(settings | optim))  # type: ignore[arg-type]
        if full:
            net: Any = load_trainable(tiny, attention)
        else:
            net = attach(load(tiny, "float32", attention), Lora(r=4, alpha=8, dropout=dropout, targets="all-linear"), 0)
        if checkpointed:
            checkpoint_activations(causal_model(net))
        tokenizer = load_tokenizer(tiny)
        tokenizer.chat_template = "{{ messages[0].content }}"  # short rows: nothing around the prompt
        data = (_Padded if apart else LisaDataModule)(tokenizer, USER, ALIGNMENT, DEFENDER, max_length=max_length)
        module = LisaModule(net, method, o, seed=1, deltas=lambda: deltas(net), key=key)
        checkpoint = Checkpoint(tmp_path / f"{folder}.ckpt", every=3)
        callbacks: list[L.Callback] = [ResumeCurves(None, "finetune"), *more]
        if stop_after is not None:
            callbacks.append(Stop(stop_after))
        trainer: dict[str, Any] = TRAINER
        if float16:
            plugin = MixedPrecision("16-mixed", "cpu")
            trainer = TRAINER | {"strategy": SingleDeviceStrategy("cpu", precision_plugin=plugin)}
        fit(module, data, trainer, checkpoint, callbacks, loggers, "finetune")
        return module

    return trained


class _Padded(LisaDataModule):
    """Data module whose rows share no prefixes, whatever the method says."""

    def connect(self, *arguments: Any, **more: Any) -> None:
        plan, _, *rest = arguments
        super().connect(plan, pad, *rest, **more)


class Stop(L.Callback):
    """Callback that breaks off a training like a kill, while the process lives on."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.after:
            raise InterruptedError


def deltas(net: Any) -> dict[str, Delta]:
    """Return a random change of rank 2 for every adapted layer, in place of the change by alignment."""
    found = {}
    for name, a in trainable(net).items():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(len(found))
            b = trainable(net)[name.replace(".lora_A.", ".lora_B.")]
            left, right = (torch.randn(size, generator=generator) for size in ((len(b), 2), (2, a.shape[1])))
            found[name.partition(".lora_A.")[0].removeprefix(PREFIX)] = Delta.low_rank(left, right)
    return found


def weights(module: LisaModule) -> dict[str, Tensor]:
    """Return the trainable weights that the method saves."""
    return module.finished_factors()


def largest_difference(a: LisaModule, b: LisaModule) -> float:
    both = zip(weights(a).values(), weights(b).values(), strict=True)
    return float(torch.stack([(x - y).abs().max() for x, y in both]).max())  # NaN, where there is any
