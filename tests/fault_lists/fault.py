"""A fault that tests/faults.py puts into the code: a piece of a file, what takes its place, who should see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is put in the place of what, and the tests that should see it."""

    file: str
    """Below lisa_lightning."""
    old: str
    new: str
    tests: str


def faults(file: str, tests: str, *pairs: tuple[str, str]) -> list[Fault]:
    """Those of one file that the same tests should see."""
    return [Fault(file, old, new, tests) for old, new in pairs]
