"""Records of a search's trials, one file each next to the folders of its jobs: `write_trial` and `read_trials`."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, CountOrZero
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import read_json, write_text

TRIALS: Final = "trials"
"""Folder of the records, within the folder of the sweep."""
UNDEFENDED: Final = "undefended"
"""Folder of the run without defense and harmful rows, within the folder of the sweep."""
DEFAULT: Final = "default"
"""Folder of the run of the defense at its default setting, within the folder of the sweep."""
REPEAT_SEARCH: Final = "delete it and repeat the command of the search"


@dataclass(frozen=True, config=STRICT)
class Objective:
    """The value that a search maximizes."""

    value: str
    """`defender`, `attacker` or an expression of metrics."""
    retain: float | None = None
    """Share of the undefended accuracy to keep; None unless `attacker`."""
    undefended_accuracy: float | None = None
    """Accuracy without defense and harmful rows, in percent; None unless `attacker`."""

    @property
    def floor(self) -> float | None:
        """Least accuracy of a model that counts, in percent; None if every model counts."""
        if self.retain is None or self.undefended_accuracy is None:
            return None
        return self.retain * self.undefended_accuracy


@dataclass(frozen=True, config=STRICT)
class Trial:
    """One trial of a search."""

    number: CountOrZero
    """Number in the order of the search, from 0."""
    job: str
    """Folder of its run, relative to that of the sweep. Trials with equal values share it."""
    value: float | None
    """Value of the objective; None if the run failed."""
    planned: CountOrZero
    """Trials that the search has in all."""
    objective: Objective


def write_trial(folder: Path, trial: Trial) -> None:
    """Write the record of a trial, in place of an earlier one with its number.

    Args:
        folder: folder of the sweep.
        trial: the trial.
    """
    path = _path(folder, trial.number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(trial), indent=1))


def drop_trials(folder: Path, first: int) -> None:
    """Delete the records of an earlier search in the folder, from a number on."""
    for path in _records(folder):
        if int(path.stem) >= first:
            path.unlink(missing_ok=True)


def read_trials(folder: Path) -> list[Trial]:
    """Return the trials of a search in their order, [] if the folder has none.

    Args:
        folder: folder of the sweep. Its files are untrusted data.

    Raises:
        UserError: if a record is damaged.
    """
    return [_read(path) for path in _records(folder)]


def search_folders(folders: list[Path]) -> list[Path]:
    """Return the folders of the searches in and below folders, sorted."""
    found_below = (path.parent for root in folders for path in root.resolve().rglob(TRIALS) if path.is_dir())
    return sorted({folder for folder in found_below if next(_records(folder), None) is not None})


def _path(folder: Path, number: int) -> Path:
    return folder / TRIALS / f"{number:04}.json"


def _records(folder: Path) -> Iterator[Path]:
    """Yield the files of the records by number."""
    yield from sorted((path for path in (folder / TRIALS).glob("*.json") if path.stem.isdecimal()), key=_number)


def _number(path: Path) -> int:
    return int(path.stem)


def _read(path: Path) -> Trial:
    content = json.dumps(read_json(path, REPEAT_SEARCH))
    try:
        # Only from JSON, a strict dataclass accepts a mapping.
        return TypeAdapter(Trial).validate_json(content)
    except ValidationError as error:
        raise UserError(f"{path} is no record of a trial. Fix: {REPEAT_SEARCH}") from error
