"""Stage `lm_eval`: measure a model's general utility by tasks of lm-evaluation-harness."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lisa_lightning.evaluation.evaluator import Evaluator
from lisa_lightning.evaluation.harness import Harness
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.evaluation.utility import utility_scores
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.pipeline.stages.models import Model
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.runtime.files import read_json, write_text


def lm_eval(
    cache: StageCache,
    evaluator: Evaluator,
    precision: str,
    harness: Harness,
    name: str,
    model: Model,
    load: Callable[[], Any],
) -> tuple[Metrics, list[Metrics]]:
    """Return the scores of a model on each task as metrics, and the cost of each task.

    A task is an entry of the cache, so that a killed run repeats only its unfinished task. Rank zero works while the
    others wait.

    Args:
        cache: the cache of stage results.
        evaluator: has the prompts of the evaluation.
        precision: `trainer.precision`.
        harness: the tasks.
        name: name of the model in metrics, `aligned` or `final`.
        model: the model.
        load: loads the model. It is called for tasks without a result.
    """
    scores: Metrics = {}
    costs = []

    def make(folder: Path, task: str) -> Metrics:
        if evaluator.fabric.is_global_zero:
            # The harness changes the padding of the tokenizer.
            tokenizer = load_tokenizer(model.folder)
            results: Any = harness.evaluate(load(), tokenizer, evaluator.prompting, precision, task)
            write_text(folder / "results.json", json.dumps(results, indent=1, default=str))
        return {}

    for task in harness.tasks:
        key = {"evaluated": model.name, **evaluator.prompting.common_key, **harness.key(task)}
        folder, cost = cache.run("lm_eval", key, partial(make, task=task))
        results = read_json(folder / "results.json", f"delete {folder}")
        for score in utility_scores(name, task, results):
            scores |= score.entries
        costs.append(cost)
    return scores, costs
