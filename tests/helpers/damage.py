"""Damages that disks, copies and people do to files, for tests that must notice each of them."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

Damage = Callable[[Path], None]


def _halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _fill_with_noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\x00\xffrest")


def _replace_with_a_list(path: Path) -> None:
    path.write_bytes(b"[1, 2]\n")


def _replace_with_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _delete(path: Path) -> None:
    path.unlink()


def flip(path: Path, position: float) -> None:
    """Flip a bit of the byte at a share of the file's length."""
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "halved": _halve,
    "empty": _empty,
    "noise": _fill_with_noise,
    "appended": _append,
    "a list": _replace_with_a_list,
    "a folder": _replace_with_a_folder,
    "deleted": _delete,
    **{f"a bit at {share}": lambda path, share=share: flip(path, share) for share in (0.03, 0.4, 0.6, 0.97)},
}


def files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder."""
    yield from (file for file in sorted(folder.rglob("*")) if file.is_file())
