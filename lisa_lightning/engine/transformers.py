"""The default engine, a model of this process: `TransformersEngine`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT
from lisa_lightning.engine.base import ModelToAnswer
from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question
from lisa_lightning.runtime.ranks import Ranks


@final
@dataclass(frozen=True, config=STRICT)
class TransformersEngine:
    """Engine that generates in this process, on all ranks, with the weights and the precision of the run."""

    @property
    def title(self) -> str:
        """Return an empty title, since pages name other engines only."""
        return ""

    def key(self, name: str, ranks: Ranks) -> dict[str, Any]:
        """Return no key: the inputs of the run determine the answers."""
        return {}

    def answers(
        self, evaluator: Evaluator, model: ModelToAnswer, questions: Sequence[Question], origin: str, path: Path
    ) -> list[Answer]:
        """Return the answers on all ranks; see `Engine.answers`."""
        return evaluator.answers(model.load(), questions, model.name, origin, path)
