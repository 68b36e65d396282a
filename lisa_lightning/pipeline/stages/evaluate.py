"""Stage `evaluate`: generate a model's answers to the held-out questions."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from lisa_lightning.evaluation.alpaca_eval import alpaca_eval_outputs
from lisa_lightning.evaluation.evaluator import (
    Answer,
    Evaluator,
    Question,
    held_out_questions,
    read_answers,
    write_answers,
)
from lisa_lightning.evaluation.metrics import Metrics, task_scores
from lisa_lightning.pipeline.stages.setting import Model, Setting
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.files import write_text
from lisa_lightning.task.base import Scored


def evaluate(setting: Setting, name: str, model: Model, earlier: Sequence[Answer]) -> tuple[list[Answer], Metrics]:
    """Generate the answers of a model, and write them to responses.jsonl.

    Args:
        setting: the shared inputs of the stages.
        name: name of the model in metrics and files, such as `aligned` or `final`.
        model: the model.
        earlier: answers of other models, which precede the new ones in responses.jsonl.

    Returns:
        The answers, and as metrics the cost and the task's score of them.
    """
    cfg = setting.cfg
    questions = held_out_questions(setting.rows)
    key = {"evaluated": model.name, "name": name} | answer_key(setting, questions)
    path = setting.out / "responses.jsonl"

    def make(folder: Path) -> Metrics:
        net: Any = setting.load(model, quantize=True)
        if model.adapter is not None:
            net = PeftModel.from_pretrained(net, model.adapter)
            net = net.merge_and_unload() if cfg.model.quantize is None else net
        net.to(setting.fabric.device)
        answers = evaluator(setting).answers(net, questions, name, short_hash(setting.origin | key), path)
        if setting.fabric.is_global_zero:
            write_answers(folder / "responses.jsonl", answers)
        return {}

    folder, cost = setting.run_stage("evaluate", key, make)
    answers = read_answers(folder / "responses.jsonl")
    if setting.fabric.is_global_zero:
        finished = {answer.model for answer in earlier} | {name}
        # A killed run may have begun the answers of a later model.
        unfinished = [answer for answer in read_answers(path) if answer.model not in finished]
        write_answers(path, [*earlier, *answers, *unfinished])
        if not isinstance(setting.task, Scored):
            outputs = alpaca_eval_outputs(answers, f"{Path(cfg.model.id or 'tiny').name}-{name}")
            write_text(setting.out / f"alpaca_eval_{name}.json", outputs)
    scores = {f"{name}/{score}": value for score, value in task_scores(setting.task, answers).items()}
    return answers, scores | cost


def evaluator(setting: Setting) -> Evaluator:
    """Return the evaluator of this run, which generates on all ranks."""
    cfg = setting.cfg
    return Evaluator(setting.fabric, setting.tokenizer, cfg.model.template, _limits(setting), cfg.evaluate.batch_size)


def answer_key(setting: Setting, questions: list[Question]) -> dict[str, Any]:
    """Return the inputs other than the model that determine its answers, as a part of a cache key."""
    return {
        "questions": short_hash([asdict(q) for q in questions]),
        "limits": _limits(setting),
        "batch_size": setting.cfg.evaluate.batch_size,
    }


def _limits(setting: Setting) -> dict[str, int]:
    """Return the maximum number of new tokens of an answer, by kind of question."""
    safety_limit = setting.cfg.evaluate.max_new_tokens
    return {"harmful": safety_limit, "harmless": safety_limit, "task": setting.cfg.task.max_new_tokens}
