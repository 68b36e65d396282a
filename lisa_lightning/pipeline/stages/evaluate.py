"""Stage `evaluate`: generate a model's answers to the held-out questions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lisa_lightning.engine.base import Engine, ModelToAnswer
from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question, read_answers, write_answers
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.runtime.cache import short_hash


def evaluate(
    cache: StageCache,
    models: ModelSource,
    evaluator: Evaluator,
    engine: Engine,
    name: str,
    model: Model,
    load: Callable[[], Any],
    questions: Sequence[Question],
    path: Path,
) -> tuple[list[Answer], Metrics]:
    """Return the answers of a model, and the cost.

    Args:
        cache: the cache of stage results.
        models: merges the model for an engine that needs a folder.
        evaluator: collects the answers.
        engine: generates the answers.
        name: name of the model in metrics and files, such as `aligned` or `final`.
        model: the model.
        load: loads the model in this process.
        questions: the held-out questions.
        path: responses.jsonl, which gets every batch of answers when it is done.
    """
    key = {"evaluated": model.name, "name": name} | evaluator.key(questions)
    key |= engine.key(name, evaluator.fabric)

    def make(folder: Path) -> Metrics:
        with TemporaryDirectory(dir=folder) as temporary:
            to_answer = ModelToAnswer(
                name,
                load,
                partial(_merged_folder, models, model, Path(temporary)),
                path.parent,
            )
            answers = engine.answers(evaluator, to_answer, questions, short_hash(cache.origin | key), path)
        if evaluator.fabric.is_global_zero:
            write_answers(folder / "responses.jsonl", answers)
        return {}

    folder, cost = cache.run("evaluate", key, make)
    return read_answers(folder / "responses.jsonl"), cost


def _merged_folder(models: ModelSource, model: Model, out: Path) -> Path:
    """Return a folder with weights and tokenizer: that of a model without an adapter, else `out`, which it fills."""
    if model.adapter is None:
        return model.folder
    models.merge(model).save_pretrained(out)
    load_tokenizer(model.folder).save_pretrained(out)
    return out
