"""A source's files as rows: the user's task, alignment, harmful, and the held-out sets."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lisa_lightning.data.files import Record, read_records
from lisa_lightning.data.templates import alpaca
from lisa_lightning.errors import UserError

PAIR = ("prompt", "response")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: the templated prompt and the answer to learn."""

    prompt: str
    response: str
    harmful: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Everything a run reads, none of it sampled or shuffled yet."""

    task: list[Row]
    alignment: list[Row]
    harmful: list[Row]
    test: list[Row]
    """Held-out task rows; the response is the target."""
    harmful_prompts: list[str]
    """Held-out harmful requests, untemplated."""
    harmless_prompts: list[str]
    """Harmless requests that look alarming, untemplated."""


def load_rows(source: Any, task: Any) -> Rows:
    """Read all files of `source` (conf/source) for `task` (an object of lisa_lightning.tasks).

    Training rows whose prompt is among the test prompts are left out, so that nothing is tested on what it learnt.

    Raises:
        UserError: see `read_records`; or a label that the task doesn't know.
    """
    test = _read(source, "test", task.fields, task.row)
    harmful_prompts = _unique(_read(source, "harmful_prompts", ("prompt",), _prompt))
    harmless_prompts = _unique(_read(source, "harmless_prompts", ("prompt",), _prompt))
    held_out = {row.prompt for row in test} | {alpaca(p) for p in (*harmful_prompts, *harmless_prompts)}

    def trained(rows: list[Row], what: str) -> list[Row]:
        kept = [row for row in rows if row.prompt not in held_out]
        if not kept:
            raise UserError(f"source.{what}: every prompt is also a test prompt, so no row is left to train on")
        return kept

    return Rows(
        task=trained(_read(source, "train", task.fields, task.row), "train"),
        alignment=trained(_read(source, "alignment", PAIR, _pair), "alignment"),
        harmful=trained([replace(r, harmful=True) for r in _read(source, "harmful", PAIR, _pair)], "harmful"),
        test=test,
        harmful_prompts=harmful_prompts,
        harmless_prompts=harmless_prompts,
    )


def _read(source: Any, name: str, fields: tuple[str, ...], make: Callable[[Record], T]) -> list[T]:
    file = source[name]
    columns = {field: field for field in fields} | dict(file.columns or {})
    unknown = set(columns) - set(fields)
    if unknown:
        raise UserError(f"source.{name}.columns names '{min(unknown)}'; allowed: {', '.join(fields)}")
    found = read_records(file.path, columns, dict(file.where or {}), make)
    end = None if file.take is None else file.skip + file.take
    chosen = found[file.skip : end]
    if not chosen:
        raise UserError(f"source.{name}.skip={file.skip}: {file.path} has only {len(found)} such rows")
    return chosen


def _pair(record: Record) -> Row:
    return Row(alpaca(str(record["prompt"])), str(record["response"]).strip())


def _prompt(record: Record) -> str:
    return str(record["prompt"])


def _unique(prompts: list[str]) -> list[str]:
    return list(dict.fromkeys(prompts))
