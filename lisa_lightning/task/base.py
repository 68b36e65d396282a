"""Interfaces of a task: `Task` turns a record into a row, `Scored` decides whether an answer is correct."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from lisa_lightning.data.source import Row


class Task(Protocol):
    """Interface of a task, see docs/add_a_task.md.

    Each task is a final class in a file of its name, and `_target_` in conf/task/NAME.yaml names the class.
    """

    fields: ClassVar[tuple[str, ...]]
    """Required fields of a record."""
    optional: ClassVar[tuple[str, ...]]
    """Optional fields of a record, "" if missing.

    A task may also have these attributes:

    - `may_be_empty`, the fields whose text may be empty;
    - `stripped`, the fields whose text loses the white space around it, unless `data.strip=false`.
    """

    def row(self, record: Mapping[str, Any]) -> Row:
        """Return instruction, input and target of a record.

        Args:
            record: value of every required and optional field.

        Raises:
            UserError: if a value is unknown to the task.
        """
        ...


@runtime_checkable
class Scored(Protocol):
    """Interface of a task with a rule for correct answers. Answers of other tasks are compared by a judge."""

    def correct(self, answer: str, target: str) -> bool:
        """Return whether an answer is correct by the paper's strict rule."""
        ...

    def correct_leniently(self, answer: str, target: str) -> bool:
        """Return whether an answer is correct ignoring the text around it.

        Every strictly correct answer is also leniently correct.
        """
        ...
