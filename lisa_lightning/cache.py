"""Folders that are named by a hash of all that determines them, built aside, renamed when complete."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lisa_lightning.disk import disk_trouble, explained, flush, write_text
from lisa_lightning.errors import UserError
from lisa_lightning.ranks import Ranks, by_first


def cache_folder(configured: str) -> Path:
    """The cache folder of the config, `~` and variables expanded."""
    return Path(os.path.expandvars(configured)).expanduser().absolute()


def digest(key: Any) -> str:
    """16 hex digits of the SHA-256 of `key` as JSON with sorted keys."""
    text = json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_digest() -> str:
    """Of every module that can change a result, so that a cache never outlives the code that filled it."""
    package = Path(__file__).parent
    # What is shown, said, swept, estimated, or judged, which has versions of its own.
    without = {"report", "judge", "explain.py", "footprint.py", "sweep.py", "usage.py"}
    files = [f for f in sorted(package.rglob("*.py")) if not without & set(f.relative_to(package).parts)]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def own_code(defense: object) -> str:
    """Of the file of a class outside the package, a user's own; empty for one of ours."""
    name = type(defense).__module__
    file = getattr(sys.modules[name], "__file__", None)
    if file is None or name.startswith(f"{__package__}."):
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def build(ranks: Ranks, parent: Path, key: Any, make: Callable[[Path], None]) -> Path:
    """The folder of `key` under `parent`; if it is absent, `make(folder)` fills it first, on all ranks together.

    One run builds while others that want the same folder wait; the lock dies with its owner. A folder is either
    complete or absent: it is filled under another name and renamed. `key.json` in it says what it was made from.

    Raises:
        UserError: the folder can't be written.
    """
    final = parent / digest(key)

    def absent() -> bool:
        held.enter_context(locked(final))
        return not final.exists()

    with ExitStack() as held:
        if by_first(ranks, absent):
            aside = Path(by_first(ranks, lambda: _fresh(final)))
            try:
                trouble = _made(make, aside)
                ranks.barrier()
                by_first(ranks, lambda: _complete(aside, final, key, trouble))
            finally:
                if ranks.is_global_zero:
                    shutil.rmtree(aside, ignore_errors=True)
    ranks.barrier()
    return final


def _made(make: Callable[[Path], None], aside: Path) -> str | None:
    """Fill the folder; the sentence if the user must put something right first."""
    try:
        make(aside)
    except UserError as error:
        return str(error)
    except Exception as error:
        if (reason := disk_trouble(error)) is None:
            raise
        return f"{aside.parent} can't be written: {reason}"
    return None


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Hold the lock beside `final`, which dies with its owner; others wait.

    Raises:
        UserError: it can't be made, or the file system knows no such locks.
    """
    with explained(final.parent):
        final.parent.mkdir(parents=True, exist_ok=True)
        handle = (final.parent / f"{final.name}.lock").open("w")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{final.parent} lies on a file system without locks ({error.strerror}), by which runs that want the "
                "same result wait for one another; name a folder on another one as cache_dir, or as LISA_CACHE"
            ) from error
        yield


def _fresh(final: Path) -> str:
    """An empty folder beside `final`; what killed builders left is removed, for the caller holds the lock."""
    for left in final.parent.glob(f"{final.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    with explained(final.parent):
        return tempfile.mkdtemp(prefix=f"{final.name}.part-", dir=final.parent)


def _complete(aside: Path, final: Path, key: Any, trouble: str | None) -> None:
    if trouble is not None:
        raise UserError(trouble)
    with explained(final.parent):
        write_text(aside / "key.json", json.dumps(key, indent=1, sort_keys=True))
        aside.chmod(0o755)
        flush(aside)
        if not final.exists():  # where locks don't hold between machines, another may have been as quick
            aside.replace(final)
