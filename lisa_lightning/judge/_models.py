"""What judges that are models of their own share: where their weights are, how they are told apart, and loading."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lisa_lightning.base_model import on_hub, refuse_incomplete
from lisa_lightning.cache import digest
from lisa_lightning.errors import UserError, first_line


def local(key: str, id: str, revision: str | None) -> Path:
    """The folder that holds a judge's weights and tokenizer, fetched from the hub if it must be; nothing is loaded.

    Raises:
        UserError: there is no such model, or it can't be fetched, or has no safetensors or no tokenizer.
    """
    folder = Path(id).expanduser()
    if not folder.is_dir():
        if id.startswith((".", "/", "~")) or id.count("/") != 1:
            raise UserError(f"{key}={id}: there is no such folder, and it is not a hub id such as owner/name")
        try:
            folder = on_hub(id, revision)
        except UserError as error:
            raise UserError(f"{key}={id}: {error}") from error
    refuse_incomplete(f"{key}={id}" + (f" at revision {revision}" if revision else ""), folder)
    return folder


def identity(id: str, folder: Path) -> Any:
    """What tells weights apart: the commit that a hub id stands for now, or the files of a folder of one's own."""
    if not Path(id).expanduser().is_dir():
        return [id, folder.name]
    files = sorted(f for f in folder.iterdir() if f.is_file())
    small = {f.name: f.read_text(encoding="utf-8") for f in files if f.suffix == ".json"}
    return digest([[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files], small])


@contextmanager
def loading(key: str, id: str) -> Iterator[None]:
    """Turn what fails while a judge is loaded into a sentence that names the key."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{key}={id} can't be loaded: {first_line(error)}") from error


def load_tokenizer(key: str, id: str, folder: Path) -> Any:
    """The tokenizer in the folder. Raises UserError where it can't be loaded."""
    from transformers import AutoTokenizer

    with loading(key, id):
        return AutoTokenizer.from_pretrained(folder)


def best_device() -> str:
    """Where to run: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
