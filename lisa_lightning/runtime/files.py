"""Files that are written whole or not at all, a folder's one owner, and a full disk said in a sentence."""

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

HYDRAS = re.compile(r"\.hydra|run\.log|train_ddp_process_\d+\.log|multirun\.yaml")
"""Names of the files that Hydra writes into the folder of every run and sweep."""
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class Held(UserError):
    """A folder that another process works in."""


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader never sees half of it."""
    with beside(path) as part:
        part.write_text(text, encoding="utf-8")


def flush(folder: Path) -> None:
    """Have the disk hold all files of a folder, so that no power cut leaves an empty one under a complete name."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Another name to write under, which is renamed to `path` once that is done."""
    part = path.with_name(path.name + ".part")
    with explained(path):
        # In a folder of somebody else's it may be a link to a file that is not theirs.
        part.unlink(missing_ok=True)
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def read_text(path: Path) -> str:
    """Return the text of a regular file; a pipe of that name, at which reading would wait, raises OSError."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_text(encoding="utf-8")


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Return the object that a JSON file holds, {} where there is no such file.

    Args:
        fix: what to do about a broken file, for the message.

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
def owned(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it isn't there; the hold dies with its owner.

    Raises:
        Held: another process holds it.
        UserError: it can't be made.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise Held(f"{folder} is another run's, which goes on right now; give another hydra.run.dir") from None
    except OSError:
        pass  # a file system that knows no such locks
    try:
        yield
    finally:
        os.close(handle)


def drop_unused(folder: Path) -> None:
    """Delete the output folder of a rejected run, if it contains only Hydra's files and no process holds its lock.

    Parents below the working directory that are empty then, as `outputs/smoke`, are deleted too.
    """
    with suppress(UserError, OSError), owned(folder):
        if all(HYDRAS.fullmatch(file.name) for file in folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in folder.absolute().parents:
                if Path.cwd() not in parent.parents:
                    break
                # The first one that holds something else ends it.
                parent.rmdir()


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failing write (full disk, no permission) into a sentence that names the path."""
    try:
        yield
    except shutil.Error as error:
        raise UserError(f"{path} can't be written: {error.args[0][0][-1]}") from error
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror or error}") from error
    except RuntimeError as error:
        if (reason := disk_trouble(error)) is None:
            raise
        raise UserError(f"{path} can't be written: {reason}") from error


def disk_trouble(error: BaseException) -> str | None:
    """The system's words if `error`, or what it came from, is a disk that takes no more.

    Libraries that write for us hide the system's error in one of their own, as its context or in its text.
    """
    if isinstance(error, OSError) and error.errno in DISK:
        return os.strerror(error.errno)
    hidden = re.search(r"\(os error (\d+)\)", str(error))
    if hidden and int(hidden[1]) in DISK:
        return os.strerror(int(hidden[1]))
    return disk_trouble(error.__context__) if error.__context__ is not None else None
