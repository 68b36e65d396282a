"""Hub ids and local folders: `local_folder` distinguishes them, `folder_hash` identifies the contents of a folder."""

from pathlib import Path

from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.errors import UserError


def local_folder(error_prefix: str, name: str) -> Path | None:
    """Return the folder that `name` is the path of, or None if `name` is a hub id.

    Args:
        error_prefix: beginning of error messages, such as `model.id=NAME`.
        name: hub id, or path of a folder; `~` is expanded.

    Raises:
        UserError: if `name` is neither an existing folder nor a hub id.
    """
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder.absolute()
    except (OSError, RuntimeError, ValueError):
        # A name that is too long, holds a NUL, or begins with an unknown `~user` names no folder.
        pass
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{error_prefix}: there is no such folder, and it is not a hub id such as owner/name")
    return None


def folder_hash(folder: Path) -> str:
    """Return a hash of the names, sizes and times of a folder's files, and of the content of its .json files."""
    files = sorted(f for f in folder.iterdir() if f.is_file())
    # Bytes that are not UTF-8 are replaced: the code that loads the file reports them.
    json_texts = {f.name: f.read_text(encoding="utf-8", errors="replace") for f in files if f.suffix == ".json"}
    return short_hash([[(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files], json_texts])
