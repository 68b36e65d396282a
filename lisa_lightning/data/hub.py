"""Read rows of data sets on the Hugging Face hub, or in a folder with the hub's layout: `read_hub`."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lisa_lightning.data.files import convert_rows
from lisa_lightning.data.reading import Reading, Record
from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.hub import local_folder

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
    """Return the results of `make` for the records of a split, in their order.

    Args:
        id: id of the data set, or a folder with the hub's layout.
        config: as in `datasets.load_dataset`; None for the default.
        split: as in `datasets.load_dataset`.
        revision: commit or branch; None for the main branch.
        files: data file to load from a repository with a script, which is never run; None for the full repository.
        rows: required number of rows of the split; None for any number.
        reading: the columns, labels and rows to read.
        make: converts a record to a result.

    Raises:
        UserError: if the set cannot be loaded, has no such config or split, or has another number of rows. Also if a
            column is missing or null, or if `make` rejects a value.
    """
    name = " ".join(filter(None, (id, config, files, split)))
    dataset = _load(id, config, split, revision, files, name)
    if rows is not None and len(dataset) != rows:
        raise UserError(
            f"{name}: it has {len(dataset)} rows where the papers' set has {rows}. "
            "Fix: name the papers' set, or set rows=null of this set to read it anyway"
        )
    return convert_rows(_rows(dataset, name), name, reading, make)


def _rows(dataset: Any, name: str) -> Iterator[tuple[str, Record]]:
    """Yield every row with its position, "row N"."""
    number = 0
    try:
        for raw in dataset:
            number += 1
            yield f"row {number}", raw
    except Exception as error:
        raise UserError(
            f"{name}, after row {number}: can't be read ({printable(first_line(error))}). "
            "Fix: read the set from a local file with source=local"
        ) from error


def _load(id: str, config: str | None, split: str, revision: str | None, files: str | None, name: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    folder = local_folder(name, id)
    try:
        if files is not None:
            data_file = str(folder / files) if folder else f"hf://datasets/{id}@{revision or 'main'}/{files}"
            return datasets.load_dataset("json", data_files={split: data_file}, split=split)
        return datasets.load_dataset(str(folder or id), config, split=split, revision=revision)
    except ValueError as error:
        # The split or config does not exist, and the library's message lists the existing ones.
        raise UserError(
            f"{name}: {printable(first_line(error))}. Fix: name a config and a split that the set has"
        ) from error
    except Exception as error:
        raise UserError(
            f"{name}: can't be loaded ({type(error).__name__}: {printable(first_line(error))}). "
            "Fix: connect to the hub (with HF_TOKEN set if the set is gated); point HF_HOME at a cache that "
            "holds it; name a folder in the hub's layout instead of the id; or read files with source=local"
        ) from error
