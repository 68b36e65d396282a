"""Read rows out of data sets on the Hugging Face hub, or in a folder of the hub's layout."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lisa_lightning.data.files import read
from lisa_lightning.data.reading import Reading, Record
from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.hub import own_folder

T = TypeVar("T")


def read_hub(
    id: str,
    config: str | None,
    split: str,
    revision: str | None,
    files: str | None,
    rows: int | None,
    reading: Reading,
    make: Callable[[Record], T],
) -> list[T]:
    """Return what `make` returns for every record of a split, in its order.

    Args:
        id: of the data set, or a folder in the hub's layout.
        config: as in `datasets.load_dataset`; None for the default.
        split: the same.
        revision: a commit or branch; None for the main one.
        files: a data file of a repository that can't be loaded by its id alone, since it brings a script.
        rows: how many the split must have; None for any number.
        reading: the columns, labels and rows to read.
        make: called with each record.

    Raises:
        UserError: The set can't be loaded, or has no such config or split. Or it has another number
            of rows, a column is missing or null, or `make` refuses a value.
    """
    name = " ".join(filter(None, (id, config, files, split)))
    dataset = _load(id, config, split, revision, files, name)
    if rows is not None and len(dataset) != rows:
        raise UserError(
            f"{name}: it has {len(dataset)} rows where the papers' set has {rows}. "
            "Fix: name the papers' set, or set rows=null of this set to read it all the same"
        )
    return read(_rows(dataset, name), name, reading, make)


def _rows(dataset: Any, name: str) -> Iterator[tuple[str, Record]]:
    number = 0
    try:
        for raw in dataset:
            number += 1
            yield f"row {number}", raw
    except Exception as error:
        raise UserError(
            f"{name}, after row {number}: can't be read ({printable(first_line(error))}). "
            "Fix: take the set from a local file with source=local"
        ) from error


def _load(id: str, config: str | None, split: str, revision: str | None, files: str | None, name: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    folder = own_folder(name, id)
    try:
        if files is not None:
            place = str(folder / files) if folder else f"hf://datasets/{id}@{revision or 'main'}/{files}"
            return datasets.load_dataset("json", data_files={split: place}, split=split)
        return datasets.load_dataset(str(folder or id), config, split=split, revision=revision)
    except ValueError as error:  # no such split or config; the library names those that there are
        raise UserError(
            f"{name}: {printable(first_line(error))}. Fix: name a config and a split that the set has"
        ) from error
    except Exception as error:
        raise UserError(
            f"The data set {name} can't be loaded ({type(error).__name__}: {printable(first_line(error))}). "
            "Fix: connect to the hub (with HF_TOKEN set where the set is gated); point HF_HOME at a cache that "
            "holds it; name a folder in the hub's layout instead of the id; or take files with source=local"
        ) from error
