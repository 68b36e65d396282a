"""A source's sets as rows: the user's, the provider's and the held-out ones; no prompt is both learnt and held out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lisa_lightning.data.files import Reading, Record, content, read_records
from lisa_lightning.data.hub import read_hub
from lisa_lightning.errors import UserError

log = logging.getLogger(__name__)

PAIR = ("prompt", "response")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One row before a template: what is asked, about what, and the answer to learn."""

    instruction: str
    context: str
    response: str


@dataclass(frozen=True, slots=True)
class Rows:
    """Everything a run reads, none of it sampled or shuffled yet."""

    train: list[Row]
    alignment: list[Row]
    harmful: list[Row]
    test: list[Row]
    """Held-out task rows; the response is the target."""
    harmful_prompts: list[str]
    """Held-out harmful requests; one may stand there several times, as in BeaverTails."""
    harmless_prompts: list[str]
    """Harmless requests that look alarming."""
    defender: list[Row]
    """Harmful rows that the provider has to defend with, where they are asked for."""
    overlap: dict[str, int]
    """Set and set -> rows of the first whose prompt is in the second, as they were read."""


def load_rows(source: Any, task: Any, allow_overlap: bool, defender: bool = False) -> Rows:
    """Read all sets of `source` (conf/source) for `task` (a lisa_lightning.task.task.Task).

    Args:
        allow_overlap: keep training rows whose prompt is also held out, and the provider's whose prompt is also a
            harmful row's, as the papers' sets have them. Otherwise those rows are left out.
        defender: read the defender's rows too.

    Raises:
        UserError: see `read_records` and `read_hub`; a label that the task doesn't know; no row is left.
    """
    test = _read(source, "test", task.fields, task.optional, task.row)
    harmful_prompts = _read(source, "harmful_prompts", ("prompt",), (), _prompt)
    harmless_prompts = _read(source, "harmless_prompts", ("prompt",), (), _prompt)
    sets = {
        "train": _read(source, "train", task.fields, task.optional, task.row),
        "alignment": _read(source, "alignment", PAIR, ("input",), _pair),
        "harmful": _read(source, "harmful", PAIR, ("input",), _pair),
    }
    if defender:
        sets["defender"] = _read(source, "defender", PAIR, ("input",), _pair)
    held_out = {
        "test": {_key(row) for row in test},
        "harmful_prompts": {_plain(p) for p in harmful_prompts},
        "harmless_prompts": {_plain(p) for p in harmless_prompts},
    }
    overlap = {}
    for name, rows in sets.items():
        others = dict(held_out)
        if name in ("alignment", "defender"):  # the user's rows stay what they are
            others["harmful"] = {_key(row) for row in sets["harmful"]}
        shared = {f"{name}_{other}": [_key(r) in prompts for r in rows] for other, prompts in others.items()}
        overlap |= {pair: sum(found) for pair, found in shared.items() if any(found)}
        if not allow_overlap:
            sets[name] = [row for row, *found in zip(rows, *shared.values(), strict=True) if not any(found)]
        if not sets[name]:
            raise UserError(
                f"source.{name}: every prompt is also in {' or '.join(others)}, so no row is left to train on; "
                "data.allow_overlap=true keeps them"
            )
    if overlap:
        said = ", ".join(f"{count} of {pair.replace('_', ' also in ', 1)}" for pair, count in overlap.items())
        log.warning("Rows whose prompt is in another set: %s; %s.", said, "kept" if allow_overlap else "left out")
    return Rows(
        **{"defender": [], **sets},
        test=test,
        harmful_prompts=harmful_prompts,
        harmless_prompts=harmless_prompts,
        overlap=overlap,
    )


def reading(entry: Any, fields: Sequence[str], optional: Sequence[str], where: str) -> Reading:
    """How an entry of a source (columns, labels, where) makes records with these fields.

    Raises:
        UserError: it names a field that there isn't, as a key of `where`.
    """
    allowed = (*fields, *optional)
    columns = {field: field for field in allowed} | dict(entry.columns or {})
    labels = {f: {str(k): str(v) for k, v in values.items()} for f, values in (entry.labels or {}).items()}
    for name, named in (("columns", columns), ("labels", labels)):
        unknown = set(named) - set(allowed)
        if unknown:
            raise UserError(f"{where}.{name} names '{min(unknown)}'; allowed: {', '.join(allowed)}")
    return Reading(columns, frozenset(optional), labels, dict(entry.where or {}))


def contents(source: Any) -> dict[str, str]:
    """A hash of every file that the source names, by its set."""
    paths = {str(name): entry if isinstance(entry, str) else entry.path for name, entry in source.items()}
    return {name: content(str(path)) for name, path in paths.items() if path is not None}


def _read(
    source: Any, name: str, fields: Sequence[str], optional: Sequence[str], make: Callable[[Record], T]
) -> list[T]:
    entry = source[name]
    how = reading(entry, fields, optional, f"source.{name}")
    if entry.path is None:
        place = str(entry.hub)
        found = read_hub(place, entry.config, entry.split, entry.revision, entry.files, entry.rows, how, make)
    else:
        place = str(entry.path)
        found = read_records(place, how, make, entry.header)
    return taken(found, entry, f"source.{name}", place)


def taken(rows: list[T], entry: Any, where: str, place: str) -> list[T]:
    """The rows that an entry's `skip` and `take` leave.

    Raises:
        UserError: none are left; with the key `where` and the rows' `place`.
    """
    chosen = rows[entry.skip : None if entry.take is None else entry.skip + entry.take]
    if not chosen:
        raise UserError(f"{where}.skip={entry.skip}: {place} has only {len(rows)} such rows")
    return chosen


def _pair(record: Mapping[str, Any]) -> Row:
    return Row(str(record["prompt"]), str(record["input"]).strip(), str(record["response"]).strip())


def _prompt(record: Mapping[str, Any]) -> str:
    return str(record["prompt"])


def _key(row: Row) -> str:
    return _plain(f"{row.instruction} {row.context}")


def _plain(prompt: str) -> str:
    """Case and blanks make no other prompt of it."""
    return " ".join(prompt.lower().split())
