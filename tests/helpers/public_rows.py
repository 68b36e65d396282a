"""Published sets, which must not be shipped. Tests that read an absent set are skipped."""

from pathlib import Path

import pytest

from benchmarks.setting import PUBLIC_ROWS


def public(name: str) -> Path:
    """Return a file or folder of a published set, and skip the test if it is absent."""
    path = PUBLIC_ROWS / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path
