"""Load the sets of a source as rows: `load_rows`. By default no training prompt is also held out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lisa_lightning.data.files import content_hash, read_records
from lisa_lightning.data.hub import read_hub
from lisa_lightning.data.normal_form import is_blank, normal_text
from lisa_lightning.data.reading import Reading, Record, format_value, normal_labels
from lisa_lightning.runtime.errors import UserError, first_line, printable

log = logging.getLogger(__name__)

PAIR_FIELDS = ("prompt", "response")
STRIPPED_PAIR_FIELDS = ("input", "response")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """Row before its template is applied: instruction, input (or "") and the answer to learn."""

    instruction: str
    context: str
    response: str
    system: str = field(default="", repr=False)
    """System prompt, which only methods add: files have none. It may hold a secret, so that `repr` omits it."""


def as_row(row: Row | Mapping[str, Any]) -> Row:
    """Return a row, from a mapping with `instruction`, `response` and, optionally, `context` and `system`.

    Args:
        row: a row, which is returned unchanged, or such a mapping.

    Raises:
        UserError: if a key is missing.
    """
    if isinstance(row, Row):
        return row
    try:
        return Row(row["instruction"], row.get("context") or "", row["response"], row.get("system") or "")
    except KeyError as error:
        raise UserError(
            f"A row has no {error}; it has {', '.join(map(str, row))}. Fix: rename its columns to instruction, "
            "response and, optionally, context and system"
        ) from error


@dataclass(frozen=True, slots=True)
class Rows:
    """All rows of a source, neither sampled nor shuffled."""

    train: list[Row]
    alignment: list[Row]
    harmful: list[Row]
    test: list[Row]
    """Held-out task rows. Their response is the target."""
    harmful_prompts: dict[str, list[str]]
    """Name of a set, "" for a single one -> held-out harmful requests, perhaps with duplicates, as in BeaverTails."""
    harmless_prompts: dict[str, list[str]]
    """The same of held-out harmless requests that look alarming."""
    defender: list[Row]
    """Harmful rows of the provider, for defenses that need them; empty unless they are loaded."""
    overlap: dict[str, int]
    """SET_OTHER -> number of rows of SET whose prompt is also in OTHER, before any are removed."""


def load_rows(source: Any, task: Any, allow_overlap: bool, defender: bool = False, strip: bool = True) -> Rows:
    """Return the rows of all sets of a source.

    Rows of local files need a visible text in every field. An empty text is allowed, with one warning, in:

    - rows of hub sets, which are used as published;
    - fields that the task names in `may_be_empty`.

    Args:
        source: set, or SET.NAME for a named prompt set -> its entry (path or hub id, columns, labels, where, skip,
            take), as `config.prompt_sets.split_source` returns it.
        task: the task of the user's rows, a lisa_lightning.task.base.Task.
        allow_overlap: keep rows that are otherwise removed, as the papers do: training rows whose prompt is also held
            out, and the provider's rows whose prompt is also that of a harmful row.
        defender: read the defender rows too.
        strip: remove white space around the texts that the task names in `stripped`, and around inputs and answers of
            the other sets. The papers keep it.

    Returns:
        The rows of all sets, in the order of their files.

    Raises:
        UserError: see `read_records`, `read_hub` and `build_reading`; also if a label is unknown to the task, or if no
            row of a training set remains.
    """
    blanks: dict[str, int] = {}
    make_row, make_pair = task.row, _pair
    if strip:
        make_row, make_pair = (
            _stripping(getattr(task, "stripped", ()), make_row),
            _stripping(STRIPPED_PAIR_FIELDS, _pair),
        )
    task_format = (task.fields, task.optional, make_row, frozenset(getattr(task, "may_be_empty", ())))
    test = _read(source, "test", *task_format, blanks)
    prompts = {name: _read_prompts(source, name, blanks) for name in ("harmful_prompts", "harmless_prompts")}
    sets = {"train": _read(source, "train", *task_format, blanks)}
    for name in ("alignment", "harmful", *(["defender"] if defender else [])):
        sets[name] = _read(source, name, PAIR_FIELDS, ("input",), make_pair, frozenset(), blanks)
    if blanks:
        counts = ", ".join(f"{count} of source.{name}" for name, count in blanks.items())
        log.warning("Rows with an empty text, which are used as they were published: %s.", counts)
    held_out = {
        "test": {_prompt_key(row) for row in test},
        **{name: {normal_text(p) for texts in named.values() for p in texts} for name, named in prompts.items()},
    }
    overlap = _drop_overlap(sets, held_out, allow_overlap)
    return Rows(
        **{"defender": [], **sets},
        test=test,
        harmful_prompts=prompts["harmful_prompts"],
        harmless_prompts=prompts["harmless_prompts"],
        overlap=overlap,
    )


def _drop_overlap(sets: dict[str, list[Row]], held_out: dict[str, set[str]], allow_overlap: bool) -> dict[str, int]:
    """Remove rows in place whose prompt is also in another set, unless `allow_overlap`.

    Returns:
        SET_OTHER -> number of rows of SET whose prompt is also in OTHER.

    Raises:
        UserError: if all rows of a set would be removed.
    """
    overlap: dict[str, int] = {}
    for name, rows in sets.items():
        other_sets = dict(held_out)
        # A prompt in both is removed from the provider's rows, never from the user's harmful rows.
        if name in ("alignment", "defender"):
            other_sets["harmful"] = {_prompt_key(row) for row in sets["harmful"]}
        keys = [_prompt_key(row) for row in rows]
        shared = {f"{name}_{other}": [key in prompts for key in keys] for other, prompts in other_sets.items()}
        overlap |= {pair: sum(flags) for pair, flags in shared.items() if any(flags)}
        if not allow_overlap:
            sets[name] = [row for row, *flags in zip(rows, *shared.values(), strict=True) if not any(flags)]
        if not sets[name]:
            raise UserError(
                f"source.{name}: every prompt is also in {' or '.join(other_sets)}, so no row is left to train on. "
                "Fix: name another set, or data.allow_overlap=true to train on these rows"
            )
    if overlap:
        counts = ", ".join(f"{count} of {pair.replace('_', ' also in ', 1)}" for pair, count in overlap.items())
        log.warning("Rows whose prompt is in another set: %s; %s.", counts, "kept" if allow_overlap else "left out")
    return overlap


def build_reading(entry: Any, fields: Sequence[str], optional: Sequence[str], key: str) -> Reading:
    """Return the `Reading` of a source's entry, from its keys columns, labels and where.

    Args:
        entry: the config of a set.
        fields: required fields of a record.
        optional: optional fields of a record.
        key: config key of the entry, for errors.

    Raises:
        UserError: if a field is unknown, if a value is null or nested, or if one raw value has two labels.
    """
    allowed = (*fields, *optional)
    columns, labels, conditions = (
        _mapping(getattr(entry, name), f"{key}.{name}") for name in ("columns", "labels", "where")
    )
    for name, mapping in (("columns", columns), ("labels", labels)):
        unknown = set(mapping) - set(allowed)
        if unknown:
            raise UserError(
                f"{key}.{name} names '{min(unknown)}'; allowed: {', '.join(allowed)}. Fix: name one of these"
            )
    return Reading(
        {f: f for f in allowed} | {f: _columns(c, f"{key}.columns", f) for f, c in columns.items()},
        frozenset(optional),
        {f: _labels(values, f"{key}.labels", f) for f, values in labels.items()},
        {column: _values(values, f"{key}.where", column) for column, values in conditions.items()},
    )


def content_hashes(source: Any) -> dict[str, str]:
    """Return the hash of every local file of a source, by set."""
    paths = {str(name): entry if isinstance(entry, str) else entry.path for name, entry in source.items()}
    return {name: content_hash(str(path)) for name, path in paths.items() if path is not None}


def _mapping(value: Any, key: str) -> dict[str, Any]:
    """Return a mapping of the config with its keys as text; null becomes an empty mapping."""
    if value is None:
        return {}
    if OmegaConf.is_config(value):
        try:
            value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: it has no value ({printable(first_line(error))}). Fix: set one") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={format_value(value)}: it must be a mapping. Fix: {key}={{NAME: VALUE}}, or null")
    if None in value:
        raise UserError(f"{key}={{null: ...}}: null is no name. Fix: name a column or field")
    return {str(name): item for name, item in value.items()}


def _is_scalar(value: Any) -> bool:
    """Return whether a config value is a text, a number or a boolean."""
    return isinstance(value, str | int | float)


def _columns(value: Any, key: str, field: str) -> str | list[str]:
    """Return the column or columns of a field. Numbers are valid names."""
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
    """Return the values of a column that select the rows to read; None is null."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not values or not all(item is None or _is_scalar(item) for item in values):
        raise UserError(
            f"{key}.{column}={_spelled(value)}: it must be a value or a list of values. "
            f"Fix: {key}={{{column}: VALUE}}, or {key}={{{column}: [VALUE, VALUE]}}"
        )
    return values


def _spelled(value: Any) -> str:
    """Return a config value in YAML's spelling, shortened."""
    return "null" if value is None else format_value(value)


def _header(value: Any, key: str) -> list[str] | None:
    """Return the column names of a table; None if it has a header line."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not value or not all(map(_is_scalar, value)):
        raise UserError(f"{key}={format_value(value)}: it must be a list of column names. Fix: {key}=[COLUMN, COLUMN]")
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
    """Return the rows of a set, and store in `blanks` the number of those with an empty text."""
    entry, key = source[name], f"source.{name}"
    # Sets of the hub are read as published, with empty texts in any field.
    lenient = frozenset(fields) if entry.path is None else may_be_empty
    row_reading = replace(build_reading(entry, fields, optional, key), filled=frozenset(fields) - lenient)
    count, blank_rows = 0, list[int]()

    def make_and_count(record: Record) -> T:
        nonlocal count
        if any(is_blank(str(record[field])) for field in lenient):
            blank_rows.append(count)
        count += 1
        return make(record)

    if entry.path is None:
        origin = str(entry.hub)
        rows = read_hub(
            origin, entry.config, entry.split, entry.revision, entry.files, entry.rows, row_reading, make_and_count
        )
    else:
        origin = str(entry.path)
        rows = read_records(origin, row_reading, make_and_count, _header(entry.header, f"{key}.header"))
    rows = slice_rows(rows, entry, key, origin)
    blank = sum(entry.skip <= index < entry.skip + len(rows) for index in blank_rows)
    if blank:
        blanks[name] = blank
    return rows


def _read_prompts(source: Any, section: str, blanks: dict[str, int]) -> dict[str, list[str]]:
    """Return the prompts of each set of a section by its name, "" for a single set."""
    keys = [str(key) for key in source if str(key).partition(".")[0] == section]
    return {key.partition(".")[2]: _read(source, key, ("prompt",), (), _prompt, frozenset(), blanks) for key in keys}


def slice_rows(rows: list[T], entry: Any, key: str, origin: str) -> list[T]:
    """Return the rows that remain after `skip` and `take` of an entry.

    Args:
        rows: all rows of the set.
        entry: the config of the set.
        key: config key of the entry, for errors.
        origin: file or hub id of the rows, for errors.

    Raises:
        UserError: if no row remains.
    """
    remaining = rows[entry.skip : None if entry.take is None else entry.skip + entry.take]
    if not remaining:
        raise UserError(f"{key}.skip={entry.skip}: {origin} has only {len(rows)} such rows. Fix: skip fewer")
    return remaining


def _pair(record: Mapping[str, Any]) -> Row:
    return Row(str(record["prompt"]), str(record["input"]), str(record["response"]))


def _stripping(fields: Sequence[str], make: Callable[[Record], Row]) -> Callable[[Record], Row]:
    """Return a function that calls `make` with a record whose `fields` have no white space around them."""
    return lambda record: make({**record, **{field: str(record[field]).strip() for field in fields}})


def _prompt(record: Mapping[str, Any]) -> str:
    return str(record["prompt"])


def _prompt_key(row: Row) -> str:
    """Return the normal form of a row's prompt. It ignores case, blanks and Unicode normalization."""
    return normal_text(f"{row.instruction} {row.context}")
