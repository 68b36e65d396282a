"""A source's files as rows: the user's task, alignment, harmful, and the held-out sets."""

from dataclasses import dataclass
from typing import Any

from lisa_lightning.data.files import Record, read_records
from lisa_lightning.data.templates import alpaca
from lisa_lightning.errors import UserError


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
    test = [task.row(r) for r in _read(source, "test", task.fields)]
    harmful_prompts = _unique(r["prompt"] for r in _read(source, "harmful_prompts", ("prompt",)))
    harmless_prompts = _unique(r["prompt"] for r in _read(source, "harmless_prompts", ("prompt",)))
    held_out = {row.prompt for row in test} | {alpaca(p) for p in (*harmful_prompts, *harmless_prompts)}

    def trained(rows: list[Row], what: str) -> list[Row]:
        kept = [row for row in rows if row.prompt not in held_out]
        if not kept:
            raise UserError(f"source.{what}: every prompt is also a test prompt, so no row is left to train on")
        return kept

    return Rows(
        task=trained([task.row(r) for r in _read(source, "train", task.fields)], "train"),
        alignment=trained(_pairs(_read(source, "alignment", ("prompt", "response"))), "alignment"),
        harmful=trained(_pairs(_read(source, "harmful", ("prompt", "response")), harmful=True), "harmful"),
        test=test,
        harmful_prompts=harmful_prompts,
        harmless_prompts=harmless_prompts,
    )


def _read(source: Any, name: str, fields: tuple[str, ...]) -> list[Record]:
    file = source[name]
    columns = {field: field for field in fields} | dict(file.columns or {})
    unknown = set(columns) - set(fields)
    if unknown:
        raise UserError(f"source.{name}.columns names '{min(unknown)}'; allowed: {', '.join(fields)}")
    records = read_records(file.path, columns, dict(file.where or {}))
    end = None if file.take is None else file.skip + file.take
    chosen = records[file.skip : end]
    if not chosen:
        raise UserError(f"source.{name}.skip={file.skip}: {file.path} has only {len(records)} such rows")
    return chosen


def _pairs(records: list[Record], harmful: bool = False) -> list[Row]:
    return [Row(alpaca(str(r["prompt"])), str(r["response"]).strip(), harmful) for r in records]


def _unique(prompts: Any) -> list[str]:
    return list(dict.fromkeys(str(p) for p in prompts))
