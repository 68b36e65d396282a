"""Atomic writes, locks of output folders, and readable errors of a full disk: `atomic_write` and `folder_lock`."""

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lisa_lightning.runtime.errors import UserError, first_line, printable

HYDRA_FILES = re.compile(r"\.hydra|run\.log|train_ddp_process_\d+\.log|multirun\.yaml")
"""Names of the files that Hydra writes into the folder of every run and sweep."""
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""Error numbers of a disk that is full or read-only."""


class FolderLockedError(UserError):
    """Error for a folder that another process has locked."""


def write_text(path: Path, text: str) -> None:
    """Write a file atomically, so that a reader never sees a part of it."""
    with atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def flush(folder: Path) -> None:
    """Flush all files of a folder to disk, so that a power cut can't leave a complete name with an empty file."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def apply_umask(folder: Path) -> None:
    """Give all files of a new folder its own read and write permissions.

    The safetensors library lets only the owner read its files, whatever the umask.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. It is renamed to `path` afterwards, or deleted after an error.

    Raises:
        UserError: if the file can't be written.
    """
    part = path.with_name(path.name + ".part")
    with reraise_write_errors(path):
        # In a foreign folder it may be a link to any file.
        part.unlink(missing_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Return the text of a regular file.

    Raises:
        OSError: if the file can't be read, or is no regular file. Reading a pipe would wait forever.
    """
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_text(encoding="utf-8")


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: path of the file.
        fix: advice in the error message for a broken file.

    Returns:
        The object, or {} if there is no such file.

    Raises:
        UserError: if the file can't be read or holds anything but a JSON object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read ({printable(first_line(error))[:200]}). Fix: {fix}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object. Fix: {fix}")
    return value


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Create a folder if it is absent, and lock it. The lock ends with the process.

    On file systems without locks the folder is not locked.

    Raises:
        FolderLockedError: if another process holds the lock.
        UserError: if the folder can't be created.
    """
    with reraise_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise FolderLockedError(
            f"{folder} is another run's, which is still running. Fix: choose another hydra.run.dir"
        ) from None
    except OSError:
        # The file system has no locks.
        pass
    try:
        yield
    finally:
        os.close(handle)


def drop_unused(folder: Path) -> None:
    """Delete the output folder of a rejected run, if it contains only Hydra's files and no process holds its lock.

    Parents below the working directory that are empty afterwards, such as `outputs/smoke`, are deleted too.
    """
    with suppress(UserError, OSError), folder_lock(folder):
        if all(HYDRA_FILES.fullmatch(file.name) for file in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in folder.absolute().parents:
                if Path.cwd() not in parent.parents:
                    break
                # The first parent that is not empty raises OSError, which ends the loop.
                parent.rmdir()


@contextmanager
def reraise_write_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a UserError that names the path."""
    try:
        yield
    except shutil.Error as error:
        raise UserError(f"{path} can't be written: {error.args[0][0][-1]}") from error
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error
    except RuntimeError as error:
        if (reason := disk_error(error)) is None:
            raise
        raise UserError(f"{path} can't be written: {reason}") from error


def disk_error(error: BaseException) -> str | None:
    """Return the system's message if an error or its context is a full or read-only disk, else None.

    Libraries hide the system's error in the context or in the text of their exceptions.
    """
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        return os.strerror(error.errno)
    quoted = re.search(r"\(os error (\d+)\)", str(error))
    if quoted and int(quoted[1]) in DISK_ERRNOS:
        return os.strerror(int(quoted[1]))
    return disk_error(error.__context__) if error.__context__ is not None else None
