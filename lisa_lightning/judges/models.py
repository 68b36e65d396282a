"""What judges that are models of their own share: where their weights are, and how they are told apart."""

from pathlib import Path
from typing import Any

from lisa_lightning.base_model import on_hub
from lisa_lightning.cache import digest
from lisa_lightning.errors import UserError


def identity(key: str, id: str, revision: str | None) -> Any:
    """What tells the weights apart: the id with its revision, or the files of a folder.

    Raises:
        UserError: `id` looks like a folder and there is none; `key` names it.
    """
    folder = Path(id).expanduser()
    if folder.is_dir():
        files = sorted(f for f in folder.iterdir() if f.is_file())
        small = {f.name: f.read_text(encoding="utf-8") for f in files if f.suffix == ".json"}
        return digest([[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files], small])
    if id.startswith((".", "/", "~")) or id.count("/") != 1:
        raise UserError(f"{key}={id}: there is no such folder, and it is not a hub id such as owner/name")
    return [id, revision]


def local(id: str, revision: str | None) -> Path:
    """The folder that holds the model, fetched from the hub if it must be. Raises UserError where that fails."""
    folder = Path(id).expanduser()
    return folder if folder.is_dir() else on_hub(id, revision)


def best_device() -> str:
    """Where to run: the GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
