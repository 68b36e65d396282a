"""Stage `token_kl`: measure a model's divergence from the initial model by token of the answer."""

import json
from collections.abc import Sequence
from pathlib import Path

from lisa_lightning.data.source import Row
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.evaluation.evaluator import Evaluator
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.evaluation.token_kl import token_divergences
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, rows_hash
from lisa_lightning.runtime.files import read_json, write_text

RESULT = "divergences.json"


def token_kl(
    cache: StageCache, models: ModelSource, evaluator: Evaluator, model: Model, rows: Sequence[Row]
) -> tuple[list[list[float]], Metrics]:
    """Return the divergence at each token of each row's answer, in nats, and the cost.

    Rank zero works while the others wait. It holds two models.

    Args:
        cache: the cache of stage results.
        models: loads both models. The initial one is the base model.
        evaluator: has the prompts of the evaluation, and the maximum number of tokens of an answer.
        model: the model.
        rows: harmful requests with answers.
    """
    tokens = evaluator.max_new_tokens["harmful"]
    key = {"evaluated": model.name, "rows": rows_hash(rows), "tokens": tokens, "batch_size": evaluator.batch_size}

    fabric = evaluator.fabric

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            net, initial = (models.serve(m, fabric.device).eval() for m in (model, models.base))
            with fabric.autocast():
                divergences = token_divergences(net, initial, _encoded(evaluator, rows, tokens), evaluator.batch_size)
            write_text(folder / RESULT, json.dumps({"divergences": divergences}))
        return {}

    folder, cost = cache.run("token_kl", key | evaluator.prompting.common_key, make)
    return read_json(folder / RESULT, f"delete {folder}")["divergences"], cost


def _encoded(evaluator: Evaluator, rows: Sequence[Row], tokens: int) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt and of the start of its answer."""
    tokenizer = evaluator.tokenizer
    return [
        (
            evaluator.prompting.encode(tokenizer, row.instruction, row.context),
            list(first_ids(tokenizer, row.response, tokens, add_special_tokens=False))[:tokens],
        )
        for row in rows
    ]
