"""Training of an adapter, shared by alignment, fine-tuning and NLSR's reference. Start at `train`."""

from collections.abc import Mapping, Sequence

from lightning.pytorch.callbacks import Callback

from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.resume_curves import ResumeCurves
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.logger.curves_logger import CurvesLogger
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.pipeline.stages.setting import Setting
from lisa_lightning.trainer.module import LisaModule


def train(
    setting: Setting,
    stage: str,
    module: LisaModule,
    rows: Mapping[Stream, Sequence[Row]],
    *,
    callbacks: Sequence[Callback] = (),
    curves: bool = True,
) -> Metrics:
    """Train the adapter of a module.

    Args:
        setting: the shared inputs of the stages.
        stage: name of the checkpoint and of the curves.
        module: the model, the method and the optimizer settings.
        rows: stream -> rows, for each stream that the method reads.
        callbacks: callbacks that evaluate during training.
        curves: whether to log curves.

    Returns:
        The cost: `seconds`, `peak_mib`, and the number of `steps`.
    """
    cfg = setting.cfg
    data = LisaDataModule(
        setting.tokenizer,
        rows.get("user", ()),
        rows.get("alignment", ()),
        rows.get("defender", ()),
        max_length=cfg.data.max_length,
        template=cfg.model.template,
        discard=stage == "finetune" and cfg.data.during_alignment == "discard",
    )
    checkpoint = Checkpoint(setting.out / "checkpoints" / f"{stage}.ckpt", cfg.checkpoint.every)
    loggers = setting.loggers if curves else None
    resume = ResumeCurves(loggers, stage)
    # Callbacks such as LearningRateMonitor require a logger on every rank.
    other_rank = [CurvesLogger(None, stage)] if curves else []
    stage_loggers = loggers.of_stage(stage) if loggers is not None else other_rank
    arguments = setting.trainer_arguments
    steps = fit(module, data, arguments, checkpoint, [resume, *callbacks], stage_loggers, stage)
    return {**checkpoint.cost, "steps": steps}
