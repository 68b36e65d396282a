"""Stage `finetune`: fine-tune the aligned model on the user's rows with the chosen method."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import Callback

from lisa_lightning.callbacks.evaluate_curve import EvaluateCurve
from lisa_lightning.callbacks.joint_gradient import JointGradient
from lisa_lightning.config.settings import Evaluate, FineTuning
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.evaluator import Evaluator, held_out_questions
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.method.base import Method
from lisa_lightning.model.full import save_full
from lisa_lightning.model.lora import save_adapter
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, stream_hashes
from lisa_lightning.pipeline.stages.train import AdapterTrainer
from lisa_lightning.runtime.cache import user_code_hash
from lisa_lightning.task.base import Task
from lisa_lightning.trainer.module import LisaModule


@dataclass(frozen=True)
class CurveEvaluation:
    """Callbacks that evaluate during fine-tuning, and their part of the cache key."""

    callbacks: list[Callback] = field(default_factory=list)
    key: dict[str, Any] | None = None


def finetune(
    cache: StageCache,
    models: ModelSource,
    trainer: AdapterTrainer,
    fabric: Fabric,
    aligned: Model,
    method: Method,
    settings: FineTuning,
    rows: Mapping[Stream, Sequence[Row]],
    *,
    discard: bool,
    curve: CurveEvaluation,
    callbacks: Mapping[str, Any],
) -> tuple[Model, Metrics]:
    """Fine-tune the aligned model on the user's rows.

    Args:
        cache: the cache of stage results.
        models: loads the aligned model.
        trainer: trains the adapter, or all weights.
        fabric: the processes of the run.
        aligned: the aligned model.
        method: the fine-tuning method.
        settings: the seed, and sections `lora` and `optim`.
        rows: user rows, alignment rows and, for a method that needs them, defender rows.
        discard: whether alignment steps discard a user batch, as the official code does.
        curve: evaluation during fine-tuning.
        callbacks: config group `callbacks`: name -> `_target_` and arguments.

    Returns:
        The aligned model with the fine-tuned adapter, or with `lora=null` the fine-tuned model; and the cost.
    """
    lora, optim = settings.lora, settings.optim.for_rows(len(rows["user"]), fabric.world_size)
    key = {
        "aligned": aligned.name,
        "method": class_key(method),
        "finetune": asdict(settings),
        "discard": discard,
        "rows": stream_hashes(rows),
        "curve": curve.key,
        **({"callbacks": dict(callbacks)} if callbacks else {}),
    }

    def make(folder: Path) -> Metrics:
        net = models.unfreeze(aligned) if lora is None else models.attach(aligned, lora, "lora", settings.seed)
        deltas = partial(models.deltas, aligned)
        module = LisaModule(net, method, optim, settings.seed, deltas, cache.origin | key)
        configured = map(instantiate, callbacks.values())
        cost = trainer.train("finetune", module, rows, callbacks=[*curve.callbacks, *configured], discard=discard)
        if fabric.is_global_zero:
            if lora is None:
                save_full(module.finish(), models.settings.dtype, aligned.folder, folder)
            else:
                save_adapter(module.finish(), str(aligned.folder), folder / "adapter")
            trainer.export_curves("finetune", folder)
        return cost

    folder, cost = cache.run("finetune", key, make)
    return Model(folder) if lora is None else Model(aligned.folder, folder / "adapter"), cost


def curve_evaluation(evaluator: Evaluator, task: Task, rows: Rows, settings: Evaluate) -> CurveEvaluation:
    """Return the evaluation during fine-tuning.

    Args:
        evaluator: generates the answers.
        task: the task of the user.
        rows: all sets of the source.
        settings: section `evaluate`. With `every=0` there is no evaluation.
    """
    if not settings.every:
        return CurveEvaluation()
    questions = held_out_questions(rows, settings.curve_harmful, settings.curve_harmless, settings.curve_rows)
    judge, refusal = EmbeddedJudge(), RefusalJudge()
    callbacks: list[Callback] = [EvaluateCurve(evaluator, judge, refusal, task, questions, settings.every)]
    key = evaluator.key(questions) | {
        "every": settings.every,
        "judge": judge.version,
        "refusal": refusal.version,
        "task": user_code_hash(task),
    }
    if settings.gradient_rows:
        callbacks.append(JointGradient(settings.gradient_rows, settings.every))
        key |= {"gradient_rows": settings.gradient_rows}
    return CurveEvaluation(callbacks, key)
