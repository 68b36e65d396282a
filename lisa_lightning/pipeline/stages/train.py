"""Training an adapter, which aligning, fine-tuning and NLSR's reference have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft import PeftModel

from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.record import Record
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.interleave import Examples, StepBatches
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.method.base import Method
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.objective.loss import choose_packing
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.pipeline.stages.setting import Setting
from lisa_lightning.trainer.module import LisaModule
from lisa_lightning.trainer.optim import Optim


def train(
    setting: Setting,
    stage: str,
    net: PeftModel,
    method: Method,
    optim: Optim,
    seed: int,
    rows: Mapping[Stream, Sequence[Row]],
    key: dict[str, Any],
    *,
    callbacks: Sequence[Any] = (),
    discard: bool = False,
    deltas: Callable[[], Mapping[str, Delta]] = dict,
    curves: bool = True,
) -> Metrics:
    """Train the adapter of `net` under a method; what it cost.

    Args:
        key: what determines the result; a checkpoint of another is refused.
        discard: throw the user's rows of alignment steps away.
        deltas: what aligning changed.
        curves: whether its steps are points of the run's curves.
    """
    streams: dict[Stream, Examples] = {name: Examples(found, setting.encode) for name, found in rows.items()}
    net.to(setting.fabric.device)  # there is attention that can't be tried out elsewhere
    packing = choose_packing(net.get_base_model(), setting.cfg.data.max_length)
    batches = StepBatches(
        streams,
        packing,
        method,
        optim.steps,
        optim.batch_size,
        optim.accumulate,
        seed,
        discard=discard,
    )
    module = LisaModule(Passes(net, batches.whole, deltas), method, optim, seed, setting.origin | key)
    path = setting.out / "checkpoints" / f"{stage}.ckpt"
    checkpoint = Checkpoint(path, setting.cfg.checkpoint.every, optim.steps)
    record = Record(setting.tracker if curves else None, stage)
    fit(module, LisaDataModule(batches), setting.cfg.trainer, checkpoint, [*callbacks, record], stage)
    return checkpoint.cost
