"""Evaluation during training: `EvaluateCurve` measures scores on held-out prompts every few steps."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lisa_lightning.evaluation.evaluator import Evaluator, Question
from lisa_lightning.evaluation.metrics import curve_scores
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.task.base import Task
from lisa_lightning.trainer.module import LisaModule


class EvaluateCurve(Callback):
    """Measures scores on some of the held-out prompts before the first step and every few steps.

    Args:
        evaluator: generates the answers.
        judge: judge of the harmful score.
        refusal: judge of the refusal rate and the over-refusal.
        task: of the user, whose accuracy is measured.
        questions: held-out prompts.
        every: optimizer steps between two evaluations, > 0.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        judge: EmbeddedJudge,
        refusal: RefusalJudge,
        task: Task,
        questions: Sequence[Question],
        every: int,
    ) -> None:
        self.evaluator = evaluator
        self.judge = judge
        self.refusal = refusal
        self.task = task
        self.questions = list(questions)
        self.every = every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate before the first step."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step == 0:
            pl_module.log_to_loggers(self._scores(pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Evaluate if an evaluation is due."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step % self.every == 0:
            pl_module.log_curves(self._scores(pl_module))

    def _scores(self, module: LisaModule) -> dict[str, float]:
        answers = self.evaluator.answers(module.net, self.questions, "training")
        scores = curve_scores(self.judge, self.refusal, self.task, answers)
        return {name: float(value) for score in scores for name, value in score.entries("eval/").items()}
