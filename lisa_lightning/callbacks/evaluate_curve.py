"""Evaluation on held-out prompts during training."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lisa_lightning.evaluate.evaluator import Evaluator, Question
from lisa_lightning.evaluate.metrics import curve_scores
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.task.base import Task
from lisa_lightning.trainer.module import LisaModule


class EvaluateCurve(Callback):
    """Scores on a part of the held-out questions, at the start and every few steps, by the embedded judge."""

    def __init__(
        self, evaluator: Evaluator, judge: EmbeddedJudge, task: Task, asked: list[Question], every: int
    ) -> None:
        self.evaluator = evaluator
        self.judge = judge
        self.task = task
        self.asked = asked
        self.every = every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The point before the first step."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step == 0:
            self._evaluate(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """A point of the curves."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step % self.every == 0:
            self._evaluate(pl_module)

    def _evaluate(self, module: LisaModule) -> None:
        answers = self.evaluator.answers(module.net, self.asked, "training")
        scores = curve_scores(self.judge, self.task, answers)
        module.metrics |= {f"eval/{name}": float(value) for name, value in scores.items()}
