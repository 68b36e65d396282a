"""Folders that are named by a hash of all that determines them, built aside, renamed when complete."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from lisa_lightning.errors import UserError

NO_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO}


class Ranks(Protocol):
    """The processes of a run, as Lightning's Fabric offers them."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first rank."""
        ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """What rank `src` passes, on every rank."""
        ...

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        ...


def cache_folder(configured: str) -> Path:
    """The cache folder of the config, `~` and variables expanded."""
    return Path(os.path.expandvars(configured)).expanduser().absolute()


def digest(key: Any) -> str:
    """16 hex digits of the SHA-256 of `key` as JSON with sorted keys."""
    text = json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def build(ranks: Ranks, parent: Path, key: Any, make: Callable[[Path], None]) -> Path:
    """The folder of `key` under `parent`; if it is absent, `make(folder)` fills it first, on all ranks together.

    One run builds while others that want the same folder wait; the lock dies with its owner. A folder is either
    complete or absent: it is filled under another name and renamed. `key.json` in it says what it was made from.

    Raises:
        UserError: the folder can't be written.
    """
    final = parent / digest(key)
    with _locked(final) if ranks.is_global_zero else nullcontext():
        if ranks.broadcast(not final.exists()):
            aside = Path(ranks.broadcast(_fresh(final) if ranks.is_global_zero else None))
            try:
                with explained(aside.parent):
                    make(aside)
                ranks.barrier()
                if ranks.is_global_zero:
                    _complete(aside, final, key)
            finally:
                if ranks.is_global_zero:
                    shutil.rmtree(aside, ignore_errors=True)
    ranks.barrier()
    return final


@contextmanager
def _locked(final: Path) -> Iterator[None]:
    with explained(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle = (final.parent / f"{final.name}.lock").open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fresh(final: Path) -> str:
    """An empty folder beside `final`; what killed builders left is removed, for the caller holds the lock."""
    for left in final.parent.glob(f"{final.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{final.name}.part-", dir=final.parent)


def _complete(aside: Path, final: Path, key: Any) -> None:
    with explained(final.parent):
        write_text(aside / "key.json", json.dumps(key, indent=1, sort_keys=True))
        aside.chmod(0o755)
        aside.replace(final)


def write_text(path: Path, text: str) -> None:
    """Write a file aside, then rename it, so that a reader never sees half of it."""
    with explained(path):
        aside = path.with_name(path.name + ".part")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failing write (full disk, no permission) into a sentence that names the path.

    Libraries that write for us hide the system's error in one of their own and keep its text.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        raise UserError(f"{path} can't be written: {reason}") from error


def write_failure(error: BaseException) -> str | None:
    """The system's words if `error`, or what it came from, is a write that the system refused."""
    if isinstance(error, OSError) and error.errno in NO_WRITE:
        return os.strerror(error.errno)
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    if hidden and int(hidden[1]) in NO_WRITE:
        return os.strerror(int(hidden[1]))
    return write_failure(error.__context__) if error.__context__ is not None else None
