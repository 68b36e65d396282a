"""Folders that all nodes of a run must share: `require_shared_folders`."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import reraise_write_errors
from lisa_lightning.runtime.ranks import Ranks, on_rank_zero

TIMEOUT_S: Final = 60.0
"""Seconds until a file of another node counts as absent. A network file system may show it late."""


def require_shared_folders(ranks: Ranks, folders: Mapping[str, Path]) -> None:
    """Check that every rank sees a file that rank zero writes into each folder.

    Args:
        ranks: processes of the run, on several nodes.
        folders: config key -> its folder.

    Raises:
        UserError: if a rank does not see a file within `TIMEOUT_S`.
    """
    name = str(ranks.broadcast(f".shared-{uuid.uuid4().hex[:8]}"))
    files = {key: folder / name for key, folder in folders.items()}

    def write() -> None:
        for file in files.values():
            with reraise_write_errors(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()

    on_rank_zero(ranks, write)
    try:
        for key, file in files.items():
            _wait_for(key, file)
        ranks.barrier()
    finally:
        if ranks.is_global_zero:
            for file in files.values():
                file.unlink(missing_ok=True)


def _wait_for(key: str, file: Path) -> None:
    """Wait until a file exists."""
    deadline = monotonic() + TIMEOUT_S
    while not _exists(file):
        if monotonic() > deadline:
            raise UserError(
                f"{key}={file.parent}: node {os.uname().nodename} does not see what the first node writes there. "
                f"Fix: set {key} to a folder on a file system that all nodes share"
            )
        sleep(0.2)


def _exists(file: Path) -> bool:
    """Return whether a file exists. Listing its folder makes a network file system ask its server."""
    return file.parent.is_dir() and file in file.parent.iterdir()
