"""The cache of results: `build_once` returns a folder that is named after the hash of all its inputs."""

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
from lisa_lightning.runtime.files import apply_umask, disk_error, flush, reraise_write_errors, write_text
from lisa_lightning.runtime.integrity import find_damage, fingerprint, visible_files
from lisa_lightning.runtime.ranks import Ranks, on_rank_zero

log = logging.getLogger(__name__)
PACKAGE = Path(__file__).parents[1]
RESULT_NEUTRAL_MODULES = (
    *("report/", "judge/", "config/arguments.py", "config/explain.py", "config/help.py", "config/parameters.py"),
    *("config/paths.py", "config/suggest.py", "config/tables.py", "pipeline/command.py", "pipeline/sweep.py"),
    *(
        "config/expression.py",
        "evaluation/paired.py",
        "pipeline/adapter_folder.py",
        "pipeline/export.py",
        "pipeline/search.py",
        "runtime/logs.py",
        "runtime/upload.py",
        "hf.py",
    ),
)
"""Modules and folders that don't affect the result of a stage."""
RECORD = "key.json"
"""File of a cached folder with its key, and size and hash of each of its files."""


def cache_folder(configured: str) -> Path:
    """Return the absolute path of the cache folder.

    Args:
        configured: config key `cache_dir`; `~` and environment variables are expanded.

    Raises:
        UserError: if it begins with `~name` and there is no such user.
    """
    try:
        return Path(os.path.expandvars(configured)).expanduser().absolute()
    except RuntimeError as error:
        raise UserError(f"cache_dir={configured}: {error} Fix: set the full path as cache_dir or LISA_CACHE") from error


def short_hash(key: Any) -> str:
    """Return the first 16 hex digits of the SHA-256 of `key` as JSON with sorted keys."""
    text = json.dumps(key, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    # A model may write half a surrogate pair, which strict UTF-8 can't encode.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def package_hash() -> str:
    """Return a hash of the source code that can change a result. It invalidates caches of older code."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in code_files())).hexdigest()[:16]


def code_files() -> list[Path]:
    """Return the modules of this package that can change a result.

    Reports, messages, sweeps and judges are omitted. Judges have separate versions.
    """
    return [
        f
        for f in sorted(PACKAGE.rglob("*.py"))
        if not f.relative_to(PACKAGE).as_posix().startswith(RESULT_NEUTRAL_MODULES)
    ]


def user_code_hash(instance: object) -> str:
    """Return a hash of the source file of a user-defined class, or "" for a class of this package.

    Args:
        instance: an instance of the class.
    """
    module = type(instance).__module__
    file = getattr(sys.modules[module], "__file__", None)
    if file is None or module.startswith(f"{PACKAGE.name}."):
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def build_once(ranks: Ranks, parent: Path, key: Any, make: Callable[[Path], None]) -> Path:
    """Return the cached folder of `key`, and build it first if it is absent or damaged.

    - One run builds while others with the same key wait. The lock ends with its process.
    - A folder is either complete or absent, because it is filled under another name and renamed.
    - Its `key.json` records `key`, and size and hash of every file.
    - A folder whose files differ from the record is deleted with a warning, and built again.

    Args:
        ranks: processes of the run.
        parent: folder of all results of this kind.
        key: JSON value that determines the result.
        make: fills the folder; it is called on all ranks.

    Raises:
        UserError: if the folder can't be written, or a damaged one can't be read or deleted.
    """
    folder = parent / short_hash(key)

    def needs_build() -> bool:
        lock.enter_context(path_lock(folder))
        return not folder.exists() or _delete_damaged(folder)

    with ExitStack() as lock:
        if on_rank_zero(ranks, needs_build):
            part = Path(on_rank_zero(ranks, lambda: _create_part(folder)))
            try:
                error_message = _fill(make, part)
                ranks.barrier()
                on_rank_zero(ranks, lambda: _finalize(part, folder, key, error_message))
            finally:
                if ranks.is_global_zero:
                    shutil.rmtree(part, ignore_errors=True)
    ranks.barrier()
    return folder


def _delete_damaged(folder: Path) -> bool:
    """Delete a folder whose files differ from its record; return whether it was deleted.

    Raises:
        UserError: if a file can't be read. It may be intact.
    """
    try:
        damage = find_damage(folder, _recorded(folder), _result_files(folder)) if folder.is_dir() else "it is no folder"
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} can't be read ({error.strerror}). Fix: make it readable, or delete {folder}"
        ) from error
    if damage is None:
        return False
    log.warning("%s is damaged (%s): it is removed and computed again.", folder, damage)
    with reraise_write_errors(folder):
        shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
    return True


def _recorded(folder: Path) -> Any:
    """Return the recorded hashes of a folder, or None if the record is absent or damaged."""
    record = folder / RECORD
    if not record.is_file():
        return None
    content = record.read_bytes()
    try:
        return json.loads(content)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _result_files(folder: Path) -> list[str]:
    return [name for name in visible_files(folder) if name != RECORD]


def _fill(make: Callable[[Path], None], part: Path) -> str | None:
    """Fill the folder, and return the message of an error that the user must fix, else None."""
    try:
        make(part)
    except UserError as error:
        return str(error)
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        return f"{part.parent} can't be written: {reason}"
    return None


@contextmanager
def path_lock(path: Path) -> Iterator[None]:
    """Wait for the lock of `path`, a file next to it, and hold it. The lock ends with the process.

    Raises:
        UserError: if the lock file can't be written, or the file system has no locks.
    """
    with reraise_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = (path.parent / f"{path.name}.lock").open("w")
    with handle:
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("Waiting for another run, which holds %s.", path)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise UserError(
                f"{path.parent} is on a file system without locks ({error.strerror}), which runs need to wait for the "
                "same result. Fix: set a folder on another one as cache_dir, or as LISA_CACHE"
            ) from error
        yield


def _create_part(folder: Path) -> str:
    """Create an empty temporary folder next to `folder`, whose lock the caller holds. Delete those of killed runs."""
    for leftover in folder.parent.glob(f"{folder.name}.part-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    part = folder.with_name(f"{folder.name}.part-{uuid.uuid4().hex[:8]}")
    with reraise_write_errors(folder.parent):
        # Unlike tempfile.mkdtemp, mkdir respects the umask, which a shared cache relies on.
        part.mkdir()
    return str(part)


def _finalize(part: Path, folder: Path, key: Any, error_message: str | None) -> None:
    """Record the files of `part` and rename it to `folder`. Raise UserError if filling it failed."""
    if error_message is not None:
        raise UserError(error_message)
    with reraise_write_errors(folder.parent):
        apply_umask(part)
        record = {"key": key, "files": fingerprint(part, visible_files(part))}
        write_text(part / RECORD, json.dumps(record, indent=1, sort_keys=True))
        flush(part)
        # Another machine may have been faster, if its file system doesn't share locks.
        if not folder.exists():
            part.replace(folder)
