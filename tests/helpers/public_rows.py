"""Published sets, which must not be shipped: tests that read one are skipped where it isn't."""

from pathlib import Path

import pytest

from benchmarks.setting import PUBLIC_ROWS


def public(name: str) -> Path:
    """A file or folder of a published set. Skips the test where it isn't there."""
    path = PUBLIC_ROWS / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path
