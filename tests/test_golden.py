"""Every method against what its official implementation did, batch by batch (recorded in tests/golden)."""

from pathlib import Path

import pytest
from replay import GOLDEN, replay

CASES = sorted(GOLDEN.glob("*.json"))


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_equals_the_official_run(case: Path) -> None:
    errors = replay(case.with_suffix(""))
    assert errors.passed, errors
