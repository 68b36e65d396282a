"""What a task is: how a record becomes a row, and when an answer is right."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from lisa_lightning.data.source import Row


class Task(Protocol):
    """One small final class a file, named by `_target_` in conf/task/NAME.yaml (docs/add_a_task.md)."""

    fields: ClassVar[tuple[str, ...]]
    """What a record must hold."""
    optional: ClassVar[tuple[str, ...]]
    """What it may hold; "" where it doesn't. A task may also have `may_be_empty`: fields whose text may be empty."""

    def row(self, record: Mapping[str, Any]) -> Row:
        """Instruction, input and target of a record. Raises UserError on a value that the task doesn't know."""
        ...


@runtime_checkable
class Scored(Protocol):
    """A task with a rule of what is correct; the answers of any other are left to a judge."""

    def correct(self, answer: str, target: str) -> bool:
        """The paper's strict rule."""
        ...

    def correct_leniently(self, answer: str, target: str) -> bool:
        """Right, however much is said around it; holds for whatever is strictly correct."""
        ...
