"""The user's fine-tuning of the aligned model, defended by the chosen method."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lisa_lightning.callbacks.evaluate_curve import EvaluateCurve
from lisa_lightning.callbacks.joint_gradient import JointGradient
from lisa_lightning.config.validate import plain
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluate.evaluator import questions
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import save_adapter
from lisa_lightning.pipeline.stages.evaluate import asking, evaluator
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_digest
from lisa_lightning.pipeline.stages.train import train
from lisa_lightning.runtime.cache import own_code
from lisa_lightning.trainer.optim import Optim


def finetune(setting: Setting, aligned: Model, method: Method) -> tuple[Model, Metrics]:
    """The aligned model with the adapter that the user's rows gave it."""
    cfg = setting.cfg
    optim = Optim.of(cfg, "optim", len(setting.user), setting.fabric.world_size)
    rows: dict[Stream, Sequence[Row]] = {
        "alignment": setting.rows.alignment,
        "user": setting.user,
        "defender": setting.defender_rows(method),
    }
    callbacks, curve = _points(setting)
    key = {
        "aligned": aligned.name,
        "method": plain(cfg.method),
        "own_code": own_code(method),
        "lora": plain(cfg.lora),
        "optim": plain(cfg.optim),
        "seed": cfg.seed,
        "during_alignment": cfg.data.during_alignment,
        **{f"{name}_rows": rows_digest(own) for name, own in rows.items()},
        "curve": curve,
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(aligned, "lora", cfg.seed)
        cost = train(
            setting,
            "finetune",
            net,
            method,
            optim,
            cfg.seed,
            rows,
            key,
            callbacks=callbacks,
            discard=cfg.data.during_alignment == "discard",
            deltas=partial(setting.deltas, aligned),
        )
        if setting.fabric.is_global_zero:
            save_adapter(net, str(aligned.folder), folder / "adapter")
            setting.keep_curves("finetune", folder)
        return cost

    folder, cost = setting.stage("finetune", key, make)
    return Model(aligned.folder, folder / "adapter"), cost | {"train/steps": optim.steps}


def _points(setting: Setting) -> tuple[list[Any], dict[str, Any] | None]:
    """What measures the points of the curves, and what determines them."""
    cfg = setting.cfg.evaluate
    if not cfg.every:
        return [], None
    asked = questions(setting.rows, cfg.curve_harmful, cfg.curve_harmless, cfg.curve_rows)
    judge = EmbeddedJudge()
    callbacks: list[Any] = [EvaluateCurve(evaluator(setting), judge, setting.task, asked, cfg.every)]
    key = asking(setting, asked) | {"every": cfg.every, "judge": judge.version, "own_code": own_code(setting.task)}
    if cfg.gradient_rows:
        callbacks.append(JointGradient(cfg.gradient_rows, cfg.every))
        key |= {"gradient_rows": cfg.gradient_rows}
    return callbacks, key
