"""The held-out questions put to a model."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from lisa_lightning.evaluate.alpaca_eval import alpaca_eval_outputs
from lisa_lightning.evaluate.evaluator import Answer, Evaluator, Question, questions, read_answers, write_answers
from lisa_lightning.evaluate.metrics import Metrics, task_scores
from lisa_lightning.pipeline.stages.setting import Model, Setting
from lisa_lightning.runtime.cache import digest
from lisa_lightning.runtime.files import write_text
from lisa_lightning.task.base import Scored


def evaluate(setting: Setting, name: str, model: Model, before: Sequence[Answer]) -> tuple[list[Answer], Metrics]:
    """All answers of a model; they stand in responses.jsonl after those of `before`, which other models gave.

    Beside them, what the task's own rule says of its answers.
    """
    cfg = setting.cfg
    asked = questions(setting.rows)
    key = {"evaluated": model.name, "name": name} | asking(setting, asked)
    path = setting.out / "responses.jsonl"

    def make(folder: Path) -> Metrics:
        net: Any = setting.load(model, quantize=True)
        if model.adapter is not None:
            net = PeftModel.from_pretrained(net, model.adapter)
            net = net.merge_and_unload() if cfg.model.quantize is None else net
        net.to(setting.fabric.device)
        answers = evaluator(setting).answers(net, asked, name, digest(setting.origin | key), path)
        if setting.fabric.is_global_zero:
            write_answers(folder / "responses.jsonl", answers)
        return {}

    folder, cost = setting.stage("evaluate", key, make)
    answers = read_answers(folder / "responses.jsonl")
    if setting.fabric.is_global_zero:
        done = {answer.model for answer in before} | {name}
        begun = [answer for answer in read_answers(path) if answer.model not in done]  # by a run that was killed
        write_answers(path, [*before, *answers, *begun])
        if not isinstance(setting.task, Scored):
            outputs = alpaca_eval_outputs(answers, f"{Path(cfg.model.id or 'tiny').name}-{name}")
            write_text(setting.out / f"alpaca_eval_{name}.json", outputs)
    scores = {f"{name}/{score}": value for score, value in task_scores(setting.task, answers).items()}
    return answers, scores | cost


def evaluator(setting: Setting) -> Evaluator:
    """What asks a model on this run's ranks."""
    cfg = setting.cfg
    return Evaluator(setting.fabric, setting.tokenizer, cfg.model.template, _limits(setting), cfg.evaluate.batch_size)


def asking(setting: Setting, asked: list[Question]) -> dict[str, Any]:
    """All that determines a model's answers, beside the model."""
    return {
        "questions": digest([asdict(q) for q in asked]),
        "limits": _limits(setting),
        "batch_size": setting.cfg.evaluate.batch_size,
    }


def _limits(setting: Setting) -> dict[str, int]:
    """New tokens of an answer, by the kind of its question."""
    safety = setting.cfg.evaluate.max_new_tokens
    return {"harmful": safety, "harmless": safety, "task": setting.cfg.task.max_new_tokens}
