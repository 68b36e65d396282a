"""A killed run whose files are damaged before it is resumed: one sentence with the fix, or a complete result."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from helpers.damage import DAMAGES
from helpers.forking import Forked

OWN = ["experiment=smoke", "optim.steps=400", "align.optim.steps=2", "evaluate.every=0", "checkpoint.every=4"]
FILES = ("curves.csv", "config.yaml", "checkpoints/finetune.ckpt", "wandb.json")


@pytest.fixture(scope="module")
def killed(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which a run was killed during fine-tuning."""
    work = tmp_path_factory.mktemp("killed")
    process = forked.start([*OWN, "hydra.run.dir=run"], work, env(work))
    curves, until = work / "run" / "curves.csv", time.monotonic() + 120
    while not ((work / "run" / FILES[2]).exists() and curves.read_text().count("finetune") > 9):
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    forked.wait(process)
    return work


def env(work: Path) -> dict[str, str]:
    return {"WANDB_MODE": "offline", "LISA_CACHE": str(work / "cache")}


def resumed(forked: Forked, killed: Path, work: Path) -> tuple[int, str]:
    """Return status and messages of a resumption, which would train to the end if nothing stopped it."""
    done = forked.run([*OWN, "resume=true", "hydra.run.dir=run"], work, env(killed))
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((name, "noise") for name in FILES),
        *((name, "halved") for name in FILES if name != "wandb.json"),
        ("checkpoints/finetune.ckpt", "a folder"),
    ],
)
def test_a_damaged_file_of_an_unfinished_run_is_named(
    forked: Forked, killed: Path, tmp_path: Path, name: str, damage: str
) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    DAMAGES[damage](tmp_path / "run" / name)
    status, output = resumed(forked, killed, tmp_path)
    assert status == 2, output[-2000:]
    sentence = output.strip().splitlines()[-1]
    assert name in sentence or ("of another run" in sentence and name == "config.yaml")
    assert "Fix: " in sentence
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_lost_row_of_the_curves_is_noticed_and_the_fix_works(forked: Forked, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed / "run", tmp_path / "run")
    curves = tmp_path / "run" / "curves.csv"
    lines = curves.read_text().splitlines(keepends=True)
    curves.write_text("".join([*lines[:5], *lines[6:]]))
    status, output = resumed(forked, killed, tmp_path)
    assert (status, "lacks rows of stage finetune" in output) == (2, True)
    assert "delete checkpoints/finetune.ckpt" in output
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    process = forked.start([*OWN, "resume=true", "hydra.run.dir=run"], tmp_path, env(killed))
    until = time.monotonic() + 60
    while not (tmp_path / "run" / FILES[2]).exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    forked.wait(process)
    steps = [
        line.split(",")[:2] for line in curves.read_text().splitlines(keepends=True) if line.startswith("finetune,")
    ]
    assert [int(step) for _, step in steps] == list(range(1, len(steps) + 1))
    assert json.loads((tmp_path / "run" / "wandb.json").read_text())["online"] is False
