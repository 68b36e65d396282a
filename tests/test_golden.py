"""The training loop against what the official implementation did, step by step (recorded in tests/golden)."""

from pathlib import Path

import pytest
from replay import replay

CASES = sorted((Path(__file__).parent / "golden").glob("*.json"))


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_equals_the_official_run(case: Path) -> None:
    errors = replay(case.with_suffix(""))
    assert errors.states_agree
    assert max(errors.weights, errors.loss, errors.drift) < 1e-5
