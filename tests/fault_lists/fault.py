"""Fault that tests/faults.py puts into the code: a piece of a file, its replacement, and the tests for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Piece of a file, its replacement, and the tests that should see it."""

    file: str
    """Path below lisa_lightning."""
    old: str
    new: str
    tests: str


def faults(file: str, tests: str, *pairs: tuple[str, str]) -> list[Fault]:
    """Return the faults of one file that the same tests should see."""
    return [Fault(file, old, new, tests) for old, new in pairs]
