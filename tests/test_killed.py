"""kill -9 at any moment, then the same command with resume=true: the result of a run never interrupted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]
MOMENTS = [
    "while aligning",
    "inside the user state",
    "inside the alignment state",
    "at a switch",
    "before the first checkpoint",
    "while a checkpoint is written",
    "while a curve row is written",
    "while evaluating the aligned model",
    "while evaluating the final model",
    "while the adapter is saved",
    "before the finished stage gets its name",
    "while judging",
    "while the report is written",
]


CHAINS = [
    "vaccine, ewc",
    "t_vaccine, ldifs",
    "repnoise, constrained_sft",
    "booster, vlguard_loss",
    "booster with vaccine, asft",
    "proximal, antidote",
    "seal, vlguard, nlsr",
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/killing.py reports of the moments."""
    return killing("moments", tmp_path_factory.mktemp("moments"))


@pytest.fixture(scope="module")
def chained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What it reports of the chains."""
    return killing("chains", tmp_path_factory.mktemp("chains"))


def killing(what: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), what, str(folder)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_if_it_had_not_been(found: dict[str, Any], moment: str) -> None:
    straight, mended = found["straight"], found[moment]
    assert mended["killed"] == -9, "the kill did not happen"
    assert mended["resumed"] == 0, mended.get("log")
    assert mended["adapter"] == straight["adapter"]
    assert mended["curves"] == straight["curves"]
    assert mended["responses"] == straight["responses"]
    assert mended["judged"] == straight["judged"]


@pytest.mark.parametrize("moment", [m for m in MOMENTS if m.startswith("while evaluating")])
def test_no_answer_is_generated_twice(found: dict[str, Any], moment: str) -> None:
    assert found["straight"]["asked"] == found[moment]["answered"] + found[moment]["asked"]
    assert found[moment]["answered"] > 0


@pytest.mark.parametrize("name", CHAINS)
def test_defenses_killed_again_and_again_end_as_if_they_had_not_been(chained: dict[str, Any], name: str) -> None:
    statuses = chained[name]["statuses"]
    assert statuses == [0, *[-9] * (len(statuses) - 2), 0], chained[name].get("log")
    assert len(statuses) == (5 if name.startswith("seal") else 4)
    assert chained[name]["differing"] == []


def test_curves_have_no_gap_and_no_double_step(found: dict[str, Any]) -> None:
    steps = [(row["stage"], int(row["step"])) for row in found["straight"]["curves"]]
    assert steps == [("align", t) for t in range(1, 6)] + [("finetune", t) for t in range(17)]
