"""Folders that are named by a hash of all that determines them, built aside, renamed when complete."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import disk_trouble, explained, flush, write_text
from lisa_lightning.runtime.integrity import find_damage, fingerprint, visible_files
from lisa_lightning.runtime.ranks import Ranks, by_first

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]
WITHOUT_RESULT = (
    *("report/", "judge/", "config/arguments.py", "config/explain.py", "config/help.py", "config/paths.py"),
    *("config/suggest.py", "pipeline/command.py", "pipeline/sweep.py", "runtime/logs.py"),
)
"""Modules, or folders of them, that change no result of a stage."""
RECORD = "key.json"
"""File of a cached folder: what it was made from, and size and hash of each of its files."""


def cache_folder(configured: str) -> Path:
    """Return the cache folder of the config, `~` and variables expanded.

    Raises:
        UserError: if it begins with `~` and a name that no user has.
    """
    try:
        return Path(os.path.expandvars(configured)).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"cache_dir={configured}: {error} Fix: write the path out, here or in LISA_CACHE") from error


def digest(key: Any) -> str:
    """16 hex digits of the SHA-256 of `key` as JSON with sorted keys."""
    text = json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A model may write half a character, which UTF-8 proper has no bytes for.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def code_digest() -> str:
    """Return a hash of the source code that can change a result, so that no cache outlives the code that filled it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in code_files())).hexdigest()[:16]


def code_files() -> list[Path]:
    """Return the modules of this package that can change a result.

    Left out are reports, messages and sweeps, and judges, whose verdicts have versions of their own.
    """
    return [
        f for f in sorted(PACKAGE.rglob("*.py")) if not f.relative_to(PACKAGE).as_posix().startswith(WITHOUT_RESULT)
    ]


def own_code(defense: object) -> str:
    """Of the file of a class outside the package, a user's own; empty for one of ours."""
    name = type(defense).__module__
    file = getattr(sys.modules[name], "__file__", None)
    if file is None or name.startswith(f"{PACKAGE.name}."):
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def build(ranks: Ranks, parent: Path, key: Any, make: Callable[[Path], None]) -> Path:
    """Return the folder of `key` under `parent`, after `make(folder)` has filled it on all ranks where it is absent.

    One run builds while others that want the same folder wait; the lock dies with its owner. A folder is either
    complete or absent: it is filled under another name and renamed. Its `key.json` records what it was made from and
    size and hash of every file. A folder whose files differ from that is removed, with a warning, and made again.

    Raises:
        UserError: if the folder can't be written, or a damaged one can't be removed.
    """
    final = parent / digest(key)

    def absent() -> bool:
        held.enter_context(locked(final))
        return not final.exists() or _removed_as_damaged(final)

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


def _removed_as_damaged(final: Path) -> bool:
    """Remove a folder whose files are not those that were recorded; return whether it was removed.

    Raises:
        UserError: if its files can't be read, which need not mean that they are damaged.
    """
    try:
        damage = find_damage(final, _recorded(final), _results(final)) if final.is_dir() else "it is no folder"
    except OSError as error:
        raise UserError(
            f"{error.filename or final} can't be read ({error.strerror}). Fix: make it readable, or delete {final}"
        ) from error
    if damage is None:
        return False
    log.warning("%s is damaged (%s): it is removed and computed again.", final, damage)
    with explained(final):
        shutil.rmtree(final) if final.is_dir() and not final.is_symlink() else final.unlink()
    return True


def _recorded(folder: Path) -> Any:
    """Return the recorded hashes of a folder, None where the record itself is damaged."""
    record = folder / RECORD
    if not record.is_file():
        return None
    content = record.read_bytes()
    try:
        return json.loads(content)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _results(folder: Path) -> list[str]:
    return [name for name in visible_files(folder) if name != RECORD]


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
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("Waiting for another run, which holds %s.", final)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{final.parent} lies on a file system without locks ({error.strerror}), by which runs that want the "
                "same result wait for one another; name a folder on another one as cache_dir, or as LISA_CACHE"
            ) from error
        yield


def _fresh(final: Path) -> str:
    """Create an empty folder next to `final`, for a caller that holds the lock; remove what killed builders left."""
    for left in final.parent.glob(f"{final.name}.part-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = final.with_name(f"{final.name}.part-{uuid.uuid4().hex[:8]}")
    with explained(final.parent):
        # Unlike tempfile.mkdtemp, mkdir respects the umask, which a shared cache relies on.
        aside.mkdir()
    return str(aside)


def _complete(aside: Path, final: Path, key: Any, trouble: str | None) -> None:
    if trouble is not None:
        raise UserError(trouble)
    with explained(final.parent):
        for file in aside.rglob("*"):
            if file.is_file():
                # safetensors gives nobody but the owner its files, whatever the umask.
                file.chmod(aside.stat().st_mode & 0o666)
        record = {"key": key, "files": fingerprint(aside, visible_files(aside))}
        write_text(aside / RECORD, json.dumps(record, indent=1, sort_keys=True))
        flush(aside)
        # Another machine may have been as quick, if its file system doesn't share locks.
        if not final.exists():
            aside.replace(final)
