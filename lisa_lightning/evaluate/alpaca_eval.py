"""Answers in the format of the package alpaca_eval, which asks a strong model which of two answers is the better."""

import json
from collections.abc import Iterable

from lisa_lightning.data.templates import joined
from lisa_lightning.evaluate.evaluator import Answer


def alpaca_eval_outputs(answers: Iterable[Answer], generator: str) -> str:
    """The task answers as a list of `instruction`, `output` and `generator`, for `alpaca_eval --model_outputs`."""
    outputs = [
        {"instruction": joined(a.prompt, a.context), "output": a.response, "generator": generator}
        for a in answers
        if a.kind == "task"
    ]
    return json.dumps(outputs, indent=1, ensure_ascii=False)
