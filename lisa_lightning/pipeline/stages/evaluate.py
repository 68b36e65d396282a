"""Stage `evaluate`: generate a model's answers to the held-out questions."""

from collections.abc import Sequence
from pathlib import Path

from lightning.fabric import Fabric

from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question, read_answers, write_answers
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.runtime.cache import short_hash


def evaluate(
    cache: StageCache,
    models: ModelSource,
    evaluator: Evaluator,
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
        evaluator: generates the answers.
        fabric: the processes of the run.
        name: name of the model in metrics and files, such as `aligned` or `final`.
        model: the model.
        questions: the held-out questions.
        path: responses.jsonl, which gets every batch of answers when it is done.
    """
    key = {"evaluated": model.name, "name": name} | evaluator.key(questions)

    def make(folder: Path) -> Metrics:
        net = models.serve(model, fabric.device)
        answers = evaluator.answers(net, questions, name, short_hash(cache.origin | key), path)
        if fabric.is_global_zero:
            write_answers(folder / "responses.jsonl", answers)
        return {}

    folder, cost = cache.run("evaluate", key, make)
    return read_answers(folder / "responses.jsonl"), cost
