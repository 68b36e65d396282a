"""Runs on two processes of which one dies or hangs: they end, with one sentence that names it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_wrong_input import ROOT

CONTINUES = "The same command with its folder and resume=true continues from the last checkpoint"


def rank_1_of(process: "subprocess.Popen[str]") -> int:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(c) for c in children if b"train_ddp_process_1" in Path(f"/proc/{c}/cmdline").read_bytes())


def ended(tmp_path: Path, disturb: Callable[["subprocess.Popen[str]"], None]) -> tuple[int, str, list[int]]:
    """Start a run on two processes and disturb it; return exit status, output, and the processes that are left."""
    arguments = ("experiment=smoke", "trainer=ddp", "trainer.accelerator=cpu", "optim.steps=3000", "evaluate.every=0")
    env = os.environ | {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *arguments, "trainer.timeout_min=0.1", "hydra.run.dir=out"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, text=True)
        curves, until = tmp_path / "out" / "curves.csv", time.monotonic() + 120
        while not (curves.exists() and "finetune" in curves.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
        ranks = [process.pid, rank_1_of(process)]
        disturb(process)
        status = process.wait(timeout=60)
    until = time.monotonic() + 20
    while (alive := [rank for rank in ranks if Path(f"/proc/{rank}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    return status, (tmp_path / "log").read_text(), alive


def send(name: signal.Signals, rank: int) -> Callable[["subprocess.Popen[str]"], None]:
    return lambda process: os.kill(process.pid if rank == 0 else rank_1_of(process), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("disturb", "expected"),
    [
        (send(signal.SIGKILL, 1), "Rank 1 of 2 was ended by SIGKILL"),
        (send(signal.SIGSTOP, 1), "Rank 1 of 2 gives no sign of life for trainer.timeout_min=0.1 minutes"),
        (send(signal.SIGKILL, 0), "Rank 0 of 2 has ended"),
    ],
)
def test_a_lost_rank_ends_the_run_with_a_sentence_that_names_it(
    tmp_path: Path, disturb: Callable[["subprocess.Popen[str]"], None], expected: str
) -> None:
    status, output, alive = ended(tmp_path, disturb)
    assert status == (2 if "Rank 1" in expected else -signal.SIGKILL)
    assert output.count(expected) == 1
    assert output.count(CONTINUES) == 1
    assert "Traceback" not in output
    assert "frame #" not in output
    assert not alive


@pytest.mark.slow
def test_ranks_do_not_wait_for_a_first_one_that_hangs(tmp_path: Path) -> None:
    def hang(process: "subprocess.Popen[str]") -> None:
        other = rank_1_of(process)
        process.send_signal(signal.SIGSTOP)
        until = time.monotonic() + 40
        # A stopped parent collects no children: one that has ended is a zombie.
        while "zombie" not in Path(f"/proc/{other}/status").read_text() and time.monotonic() < until:
            time.sleep(0.1)
        assert "zombie" in Path(f"/proc/{other}/status").read_text()
        process.kill()

    _, output, alive = ended(tmp_path, hang)
    assert output.count("Rank 0 of 2 gives no sign of life for trainer.timeout_min=0.1 minutes") == 1
    assert not alive


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks(tmp_path: Path) -> None:
    def interrupt(process: "subprocess.Popen[str]") -> None:
        for rank in (rank_1_of(process), process.pid):
            os.kill(rank, signal.SIGINT)

    status, output, alive = ended(tmp_path, interrupt)
    assert (status, output.count("Stopped by Ctrl-C; ")) == (128 + signal.SIGINT, 1)
    assert "Traceback" not in output
    assert not alive
