"""Stage `evaluate`: generate a model's answers to the held-out questions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from lightning.fabric import Fabric

from lisa_lightning.engine.base import Engine, ModelToAnswer
from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question, read_answers, write_answers
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.runtime.cache import short_hash


def evaluate(
    cache: StageCache,
    models: ModelSource,
    evaluator: Evaluator,
    engine: Engine,
    fabric: Fabric,
    name: str,
    model: Model,
    questions: Sequence[Question],
    path: Path,
) -> tuple[list[Answer], Metrics]:
    """Return the answers of a model, and the cost.

    Args:
        cache: the cache of stage results.
        models: loads the model.
        evaluator: collects the answers.
        engine: generates the answers.
        fabric: the processes of the run.
        name: name of the model in metrics and files, such as `aligned` or `final`.
        model: the model.
        questions: the held-out questions.
        path: responses.jsonl, which gets every batch of answers when it is done.
    """
    key = {"evaluated": model.name, "name": name} | evaluator.key(questions)
    key |= engine.key(name, fabric)

    def make(folder: Path) -> Metrics:
        with TemporaryDirectory(dir=folder) as temporary:
            to_answer = ModelToAnswer(
                name,
                partial(models.serve, model, fabric.device),
                partial(_merged_folder, models, evaluator, model, Path(temporary)),
                path.parent,
            )
            answers = engine.answers(evaluator, to_answer, questions, short_hash(cache.origin | key), path)
        if fabric.is_global_zero:
            write_answers(folder / "responses.jsonl", answers)
        return {}

    folder, cost = cache.run("evaluate", key, make)
    return read_answers(folder / "responses.jsonl"), cost


def _merged_folder(models: ModelSource, evaluator: Evaluator, model: Model, out: Path) -> Path:
    """Return a folder with weights and tokenizer: that of a model without an adapter, else `out`, which it fills."""
    if model.adapter is None:
        return model.folder
    models.serve(model, torch.device("cpu")).save_pretrained(out)
    evaluator.tokenizer.save_pretrained(out)
    return out
