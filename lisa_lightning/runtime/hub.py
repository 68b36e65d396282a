"""Whether a value of the config is a hub id or a folder, and what tells a folder's contents apart."""

from pathlib import Path

from lisa_lightning.runtime.cache import digest
from lisa_lightning.runtime.errors import UserError


def own_folder(at: str, id: str) -> Path | None:
    """The folder that `id` names, `~` expanded; None where it is a hub id.

    Raises:
        UserError, which begins with `at`: it can be neither.
    """
    try:
        folder = Path(id).expanduser()
        if folder.is_dir():
            return folder.absolute()
    except (OSError, RuntimeError, ValueError):
        # A name that is too long, holds a NUL, or begins with an unknown `~user` names no folder.
        pass
    if id.startswith((".", "/", "~")) or id.count("/") != 1:
        raise UserError(f"{at}: there is no such folder, and it is not a hub id such as owner/name")
    return None


def contents_digest(folder: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's files, and of the content of its .json files."""
    files = sorted(f for f in folder.iterdir() if f.is_file())
    # Surrogates stand for bytes that are not UTF-8: who loads the file explains what is wrong with it.
    small = {f.name: f.read_text(encoding="utf-8", errors="replace") for f in files if f.suffix == ".json"}
    return digest([[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files], small])
