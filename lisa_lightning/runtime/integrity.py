"""Sizes and hashes of files: `fingerprint` records a complete result, `find_damage` verifies it before its next use."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

Fingerprints = dict[str, dict[str, Any]]
"""Path of a file relative to its folder -> its size in bytes and its SHA-256."""


def visible_files(folder: Path) -> list[str]:
    """Return the paths, relative to `folder`, of all files below it, except hidden ones.

    File managers and network file systems create hidden files that belong to no result.
    """
    paths = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def fingerprint(folder: Path, names: Iterable[str]) -> Fingerprints:
    """Return size and hash of the files with these names. Absent files are omitted."""
    return {name: _fingerprint(folder / name) for name in sorted(names) if (folder / name).is_file()}


def find_damage(folder: Path, recorded: Any, names: Iterable[str]) -> str | None:
    """Compare files with their recorded fingerprint.

    Args:
        folder: folder of the files.
        recorded: result of `fingerprint`. Any other value is a damaged record and counts as damage.
        names: names of the files that may be in `folder`.

    Returns:
        The first difference in words, or None if there is no difference.

    Raises:
        OSError: if a file can't be read. It may be intact.
    """
    if not isinstance(recorded, dict) or not recorded:
        return "its list of files is missing"
    current = fingerprint(folder, names)
    for name in sorted({*recorded, *current}):
        if name not in current:
            return f"{name} is missing"
        if name not in recorded:
            return f"{name} was added"
        if current[name] != recorded[name]:
            return f"{name} has changed"
    return None


def _fingerprint(file: Path) -> dict[str, Any]:
    stat = file.stat()
    return {"bytes": stat.st_size, "sha256": _sha256(file, stat.st_size, stat.st_mtime_ns)}


@lru_cache(maxsize=4096)
def _sha256(file: Path, size: int, modified_ns: int) -> str:
    """Return the hash of a file, computed once per process and version because jobs of a sweep share large models."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
