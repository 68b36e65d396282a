"""Stage `finetune`: fine-tune the aligned model on the user's rows with the chosen method."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from lisa_lightning.callbacks.evaluate_curve import EvaluateCurve
from lisa_lightning.callbacks.joint_gradient import JointGradient
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.validate import plain
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.evaluator import held_out_questions
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import save_adapter
from lisa_lightning.pipeline.stages.evaluate import answer_key, evaluator
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_hash
from lisa_lightning.pipeline.stages.train import train
from lisa_lightning.runtime.cache import user_code_hash
from lisa_lightning.trainer.module import LisaModule


def finetune(setting: Setting, aligned: Model, method: Method) -> tuple[Model, Metrics]:
    """Fine-tune the aligned model on the user's rows.

    Args:
        setting: the shared inputs of the stages.
        aligned: the aligned model.
        method: the fine-tuning method.

    Returns:
        The model with the fine-tuned adapter, and the cost.
    """
    cfg = setting.cfg
    optim = Optim(**plain(cfg.optim)).for_rows(len(setting.user), setting.fabric.world_size)
    rows: dict[Stream, Sequence[Row]] = {
        "alignment": setting.rows.alignment,
        "user": setting.user,
        "defender": setting.defender_rows(method),
    }
    callbacks, curve_key = curve_callbacks(setting)
    custom_callbacks = plain(cfg.callbacks)
    key = {
        "aligned": aligned.name,
        "method": plain(cfg.method),
        "own_code": user_code_hash(method),
        "lora": plain(cfg.lora),
        "optim": plain(cfg.optim),
        "seed": cfg.seed,
        "during_alignment": cfg.data.during_alignment,
        **{f"{name}_rows": rows_hash(stream_rows) for name, stream_rows in rows.items()},
        "curve": curve_key,
        **({"callbacks": custom_callbacks} if custom_callbacks else {}),
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(aligned, "lora", cfg.seed)
        module = LisaModule(net, method, optim, cfg.seed, partial(setting.deltas, aligned), setting.origin | key)
        configured = map(instantiate, custom_callbacks.values())
        cost = train(setting, "finetune", module, rows, callbacks=[*callbacks, *configured])
        if setting.fabric.is_global_zero:
            save_adapter(net, str(aligned.folder), folder / "adapter")
            setting.export_curves("finetune", folder)
        return cost

    folder, cost = setting.run_stage("finetune", key, make)
    return Model(aligned.folder, folder / "adapter"), cost


def curve_callbacks(setting: Setting) -> tuple[list[Any], dict[str, Any] | None]:
    """Return the callbacks that evaluate during fine-tuning, and their part of the cache key.

    Returns:
        `([], None)` if `evaluate.every` is 0.
    """
    cfg = setting.cfg.evaluate
    if not cfg.every:
        return [], None
    questions = held_out_questions(setting.rows, cfg.curve_harmful, cfg.curve_harmless, cfg.curve_rows)
    judge = EmbeddedJudge()
    callbacks: list[Any] = [EvaluateCurve(evaluator(setting), judge, setting.task, questions, cfg.every)]
    key = answer_key(setting, questions) | {
        "every": cfg.every,
        "judge": judge.version,
        "own_code": user_code_hash(setting.task),
    }
    if cfg.gradient_rows:
        callbacks.append(JointGradient(cfg.gradient_rows, cfg.every))
        key |= {"gradient_rows": cfg.gradient_rows}
    return callbacks, key
