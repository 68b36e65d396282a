"""Reading rows out of data sets on the Hugging Face hub, or in a folder of the hub's layout."""

from collections.abc import Callable
from typing import Any, TypeVar

from lisa_lightning.data.files import Reading, Record, read
from lisa_lightning.errors import UserError, first_line
from lisa_lightning.hub_or_folder import own_folder

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
    """What `make` makes of the records of a split, in its order.

    Args:
        id: of the data set, or a folder in the hub's layout.
        files: a data file of a repository that can't be loaded by its id alone, since it brings a script.
        rows: how many the split must have; None for any number.

    Raises:
        UserError: the set can't be reached, with the ways out; it has no such config or split, or another number of
            rows; a column is missing or null, or `make` refuses a value.
    """
    name = " ".join(filter(None, (id, config, files, split)))
    dataset = _load(id, config, split, revision, files, name)
    if rows is not None and len(dataset) != rows:
        raise UserError(
            f"{name}: it has {len(dataset)} rows where the papers' set has {rows}; rows=null of this set lets it pass"
        )
    return read(((f"row {number}", raw) for number, raw in enumerate(dataset, 1)), name, reading, make)


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
        raise UserError(f"{name}: {first_line(error)}") from error
    except Exception as error:
        raise UserError(
            f"The data set {name} is not to be had ({type(error).__name__}: {first_line(error)}). "
            "Ways out: connect to the hub (with HF_TOKEN set where the set is gated); point HF_HOME at a cache that "
            "holds it; name a folder in the hub's layout instead of the id; or take files with source=local."
        ) from error
