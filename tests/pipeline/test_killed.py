"""kill -9 at any moment, then the same command with resume=true: the result of a run never interrupted."""

from typing import Any

import pytest

from helpers.forking import run_helper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]
CHAINS = {
    "training": 7,
    "evaluating, judging, reporting": 4,
    "seal, t_vaccine, asft, nlsr": 4,
    "outliers, filter": 5,
    "outliers by gradient": 2,
    "edit": 3,
    "lisa on all weights": 3,
}
"""Chain of tests/helpers/killing.py -> number of kills."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the report of tests/helpers/killing.py."""
    return run_helper("killing", str(tmp_path_factory.mktemp("killed")), timeout=600)


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(found: dict[str, Any], name: str) -> None:
    assert found[name]["statuses"] == [0, *[-9] * CHAINS[name], 0], found[name].get("log")
    assert found[name]["differing"] == []


def test_no_answer_is_generated_twice(found: dict[str, Any]) -> None:
    straight, killed = found["evaluating, judging, reporting"]["asked"]
    assert killed == straight > 0


def test_curves_have_no_gap_and_no_double_step(found: dict[str, Any]) -> None:
    steps = [tuple(step) for step in found["training"]["steps"]]
    assert steps == [("align", t) for t in range(1, 6)] + [("finetune", t) for t in range(17)]
