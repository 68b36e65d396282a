"""A source's sets as rows: the user's, the provider's and the held-out ones; no prompt is both learnt and held out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lisa_lightning.data.files import content, read_records
from lisa_lightning.data.hub import read_hub
from lisa_lightning.data.normal_form import is_blank, normal_text
from lisa_lightning.data.reading import Reading, Record, normal_labels, shown
from lisa_lightning.runtime.errors import UserError, first_line, printable

log = logging.getLogger(__name__)

PAIR = ("prompt", "response")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One row before a template: instruction, input (or "") and the answer to learn."""

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
    """Held-out harmful requests; one may occur several times, as in BeaverTails."""
    harmless_prompts: list[str]
    """Harmless requests that look alarming."""
    defender: list[Row]
    """Harmful rows that the provider has to defend with; empty unless they are loaded."""
    overlap: dict[str, int]
    """Set and set -> rows of the first whose prompt is in the second, as they were read."""


def load_rows(source: Any, task: Any, allow_overlap: bool, defender: bool = False) -> Rows:
    """Read all sets of `source` (conf/source) for `task` (a lisa_lightning.task.base.Task).

    Rows of local files need a visible text in every field. Published sets stay as they are: rows of hub sets, and
    fields that the task names in `may_be_empty`, are read with an empty text, and one warning has their number.

    Args:
        source: set -> its entry (path or hub id, columns, labels, where, skip, take).
        task: the task of the user's rows.
        allow_overlap: read training rows whose prompt is also held out, and the provider's whose prompt is also a
            harmful row's, as the papers' sets have them. Otherwise those rows are left out.
        defender: read the defender's rows too.

    Returns:
        The rows of all sets, in their order.

    Raises:
        UserError: See `read_records`, `read_hub` and `reading`. A label is unknown to the task, or no row is left.
    """
    blanks: dict[str, int] = {}
    tasks = (task.fields, task.optional, task.row, frozenset(getattr(task, "may_be_empty", ())))
    test = _read(source, "test", *tasks, blanks)
    prompts = [
        _read(source, name, ("prompt",), (), _prompt, frozenset(), blanks)
        for name in ("harmful_prompts", "harmless_prompts")
    ]
    sets = {"train": _read(source, "train", *tasks, blanks)}
    for name in ("alignment", "harmful", *(["defender"] if defender else [])):
        sets[name] = _read(source, name, PAIR, ("input",), _pair, frozenset(), blanks)
    if blanks:
        counts = ", ".join(f"{count} of source.{name}" for name, count in blanks.items())
        log.warning("Rows with an empty text, which are used as they were published: %s.", counts)
    held_out = {
        "test": {_key(row) for row in test},
        "harmful_prompts": set(map(normal_text, prompts[0])),
        "harmless_prompts": set(map(normal_text, prompts[1])),
    }
    overlap = _drop_overlap(sets, held_out, allow_overlap)
    return Rows(
        **{"defender": [], **sets},
        test=test,
        harmful_prompts=prompts[0],
        harmless_prompts=prompts[1],
        overlap=overlap,
    )


def _drop_overlap(sets: dict[str, list[Row]], held_out: dict[str, set[str]], allow_overlap: bool) -> dict[str, int]:
    """Remove rows whose prompt is in another set, unless they are allowed.

    Returns:
        Set and set -> rows of the first whose prompt is in the second.

    Raises:
        UserError: All rows of a set would be removed.
    """
    overlap: dict[str, int] = {}
    for name, rows in sets.items():
        others = dict(held_out)
        if name in ("alignment", "defender"):  # The user's rows stay what they are.
            others["harmful"] = {_key(row) for row in sets["harmful"]}
        keys = [_key(row) for row in rows]
        shared = {f"{name}_{other}": [key in prompts for key in keys] for other, prompts in others.items()}
        overlap |= {pair: sum(flags) for pair, flags in shared.items() if any(flags)}
        if not allow_overlap:
            sets[name] = [row for row, *flags in zip(rows, *shared.values(), strict=True) if not any(flags)]
        if not sets[name]:
            raise UserError(
                f"source.{name}: every prompt is also in {' or '.join(others)}, so no row is left to train on. "
                "Fix: name another set, or data.allow_overlap=true to train on these rows"
            )
    if overlap:
        counts = ", ".join(f"{count} of {pair.replace('_', ' also in ', 1)}" for pair, count in overlap.items())
        log.warning("Rows whose prompt is in another set: %s; %s.", counts, "kept" if allow_overlap else "left out")
    return overlap


def reading(entry: Any, fields: Sequence[str], optional: Sequence[str], where: str) -> Reading:
    """Return how an entry of a source (columns, labels, where) makes records with these fields.

    Args:
        entry: the config of a set.
        fields: fields that a record must have.
        optional: fields that it may have.
        where: the entry's config key, for errors.

    Raises:
        UserError: A field is unknown, or a value is null or nested. Or two labels are given for one value.
    """
    allowed = (*fields, *optional)
    columns, labels, conditions = (
        _mapping(getattr(entry, name), f"{where}.{name}") for name in ("columns", "labels", "where")
    )
    for name, mapping in (("columns", columns), ("labels", labels)):
        unknown = set(mapping) - set(allowed)
        if unknown:
            raise UserError(f"{where}.{name} names '{min(unknown)}'; allowed: {', '.join(allowed)}")
    return Reading(
        {f: f for f in allowed} | {f: _columns(c, f"{where}.columns", f) for f, c in columns.items()},
        frozenset(optional),
        {f: _labels(values, f"{where}.labels", f) for f, values in labels.items()},
        {column: _values(values, f"{where}.where", column) for column, values in conditions.items()},
    )


def contents(source: Any) -> dict[str, str]:
    """Return a hash of every file that the source names, by its set."""
    paths = {str(name): entry if isinstance(entry, str) else entry.path for name, entry in source.items()}
    return {name: content(str(path)) for name, path in paths.items() if path is not None}


def _mapping(value: Any, key: str) -> dict[str, Any]:
    """Return a mapping of the config with its keys as text; null is an empty one."""
    if value is None:
        return {}
    if OmegaConf.is_config(value):
        try:
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: it has no value ({printable(first_line(error))}). Fix: give one") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={shown(value)}: it must be a mapping. Fix: {key}={{NAME: VALUE}}, or null")
    if None in value:
        raise UserError(f"{key}={{null: ...}}: null is no name. Fix: name a column or field")
    return {str(name): item for name, item in value.items()}


def _is_scalar(value: Any) -> bool:
    """Return whether a config value is a text, a number or a boolean."""
    return isinstance(value, str | int | float)


def _columns(value: Any, key: str, field: str) -> str | list[str]:
    """Return the column or columns of a field. Numbers are names too."""
    names = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not names or not all(map(_is_scalar, names)):
        raise UserError(
            f"{key}.{field}={_spelled(value)}: it must be the name of a column, or a list of names. "
            f"Fix: {key}={{{field}: COLUMN}}, or {key}={{{field}: [COLUMN, COLUMN]}}"
        )
    return str(value) if _is_scalar(value) else [str(name) for name in names]


def _labels(value: Any, key: str, field: str) -> dict[str, str]:
    """Return the labels of a field, raw value -> label."""
    fix = f"Fix: {key}={{{field}: {{RAW: LABEL}}}}"
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{key}.{field}={_spelled(value)}: it must be a mapping of raw values. {fix}")
    for raw, label in value.items():
        if raw is None or not _is_scalar(label):
            pair = f"{_spelled(raw)}: {_spelled(label)}"
            raise UserError(f"{key}.{field}={{{pair}}}: both must be a text, a number or a boolean. {fix}")
    labels = {str(raw): str(label) for raw, label in value.items()}
    normal_labels(f"{key}.{field}", labels)
    return labels


def _values(value: Any, key: str, column: str) -> list[Any]:
    """Return the values of a column whose rows are read; None is null."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or not all(item is None or _is_scalar(item) for item in values):
        raise UserError(
            f"{key}.{column}={_spelled(value)}: it must be a value or a list of values. "
            f"Fix: {key}={{{column}: VALUE}}, or {key}={{{column}: [VALUE, VALUE]}}"
        )
    return values


def _spelled(value: Any) -> str:
    """Return a config value as it is spelled in YAML, shortened."""
    return "null" if value is None else shown(value)


def _header(value: Any, key: str) -> list[str] | None:
    """Return the names of a table's columns."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or not all(map(_is_scalar, value)):
        raise UserError(f"{key}={shown(value)}: it must be a list of column names. Fix: {key}=[COLUMN, COLUMN]")
    return [str(name) for name in value]


def _read(
    source: Any,
    name: str,
    fields: Sequence[str],
    optional: Sequence[str],
    make: Callable[[Record], T],
    may_be_empty: frozenset[str],
    blanks: dict[str, int],
) -> list[T]:
    """Return the rows of a set, and count in `blanks` those with an empty text.

    Args:
        may_be_empty: fields in which an empty text is read. In hub sets they are all.
    """
    entry, key = source[name], f"source.{name}"
    lenient = frozenset(fields) if entry.path is None else may_be_empty
    how = replace(reading(entry, fields, optional, key), filled=frozenset(fields) - lenient)
    count, blank_rows = 0, list[int]()

    def counted(record: Record) -> T:
        nonlocal count
        if any(is_blank(str(record[field])) for field in lenient):
            blank_rows.append(count)
        count += 1
        return make(record)

    if entry.path is None:
        name_of_set = str(entry.hub)
        rows = read_hub(name_of_set, entry.config, entry.split, entry.revision, entry.files, entry.rows, how, counted)
    else:
        name_of_set = str(entry.path)
        rows = read_records(name_of_set, how, counted, _header(entry.header, f"{key}.header"))
    rows = taken(rows, entry, key, name_of_set)
    blank = sum(entry.skip <= index < entry.skip + len(rows) for index in blank_rows)
    if blank:
        blanks[name] = blank
    return rows


def taken(rows: list[T], entry: Any, where: str, origin: str) -> list[T]:
    """Return the rows that an entry's `skip` and `take` leave.

    Args:
        rows: all rows of the set.
        entry: the config of the set.
        where: the entry's config key, for errors.
        origin: the file or hub id of the rows, for errors.

    Raises:
        UserError: None are left.
    """
    chosen = rows[entry.skip : None if entry.take is None else entry.skip + entry.take]
    if not chosen:
        raise UserError(f"{where}.skip={entry.skip}: {origin} has only {len(rows)} such rows. Fix: skip fewer")
    return chosen


def _pair(record: Mapping[str, Any]) -> Row:
    return Row(str(record["prompt"]), str(record["input"]).strip(), str(record["response"]).strip())


def _prompt(record: Mapping[str, Any]) -> str:
    return str(record["prompt"])


def _key(row: Row) -> str:
    """Return the prompt's normal form: case, blanks and Unicode forms make no difference."""
    return normal_text(f"{row.instruction} {row.context}")
