"""Interface of generation engines: `Engine`, and `ModelToAnswer`, the model that one makes answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question
from lisa_lightning.runtime.ranks import Ranks


@dataclass(frozen=True, slots=True)
class ModelToAnswer:
    """A model of a run, for an engine."""

    name: str
    """`aligned` or `final`."""
    load: Callable[[], Any]
    """Loads the model in this process."""
    export: Callable[[], Path]
    """Returns a folder with the model's weights, adapter merged, and its tokenizer."""
    out: Path
    """Output folder of the run, for logs."""


class Engine(Protocol):
    """Generates the answers of the stage evaluate. Points of curves are always generated in this process."""

    @property
    def title(self) -> str:
        """Description for the page; "" for the default engine."""
        ...

    def key(self, name: str, ranks: Ranks) -> dict[str, Any]:
        """Return what determines answers besides the model, as a part of a cache key; {} for the default engine.

        Args:
            name: name of the model, `aligned` or `final`.
            ranks: processes of the run, of which rank zero asks.

        Raises:
            UserError: if the engine can't be reached.
        """
        ...

    def answers(
        self, evaluator: Evaluator, model: ModelToAnswer, questions: Sequence[Question], origin: str, path: Path
    ) -> list[Answer]:
        """Return the model's answer to each question, in order. It is called on all ranks.

        Args:
            evaluator: collects and stores the answers.
            model: the model.
            questions: the questions.
            origin: hash of the model and of everything that determines its answers.
            path: responses.jsonl, see `Evaluator.answers`.

        Returns:
            The answers on rank zero, and these or [] on the other ranks.

        Raises:
            UserError: if the engine can't be started or reached, or rejects a prompt.
        """
        ...
