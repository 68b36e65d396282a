"""Task answers in the format of the package alpaca_eval, in which a strong model compares two answers."""

import json
from collections.abc import Iterable

from lisa_lightning.data.templates import join_context
from lisa_lightning.evaluation.evaluator import Answer


def alpaca_eval_outputs(answers: Iterable[Answer], generator: str) -> str:
    """Return the task answers as a JSON list of `instruction`, `output` and `generator`.

    Args:
        answers: answers of any kind; those of other kinds than task are left out.
        generator: name of the model.

    Returns:
        The text of a file for `alpaca_eval --model_outputs`.
    """
    outputs = [
        {"instruction": join_context(a.prompt, a.context), "output": a.response, "generator": generator}
        for a in answers
        if a.kind == "task"
    ]
    return json.dumps(outputs, indent=1, ensure_ascii=False)
