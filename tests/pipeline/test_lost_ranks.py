"""Ranks of which one dies or hangs: the others end, with one sentence that names it."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import ROOT
from lisa_lightning.runtime import launch as processes
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.launch import launch_ranks
from lisa_lightning.runtime.ranks import RankLostError, Ranks

pytestmark = pytest.mark.slow
CONTINUES = "Fix: repeat the command with its folder and resume=true, which continues from the last checkpoint"
Work = Callable[[Ranks, int], object]


class Lightning:
    """Stand-in for Fabric in `launch_ranks`: two processes that exist already, and a broadcast through a pipe."""

    def __init__(self, rank: int, children: list[Any], pipe: Connection) -> None:
        self.global_rank, self.world_size, self.is_global_zero = rank, 2, rank == 0
        self.children, self.pipe = children, pipe

    def launch(self) -> None:
        if self.children:
            processes.subprocess_script._launch_process_observer(self.children)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.is_global_zero:
            self.pipe.send(obj)
            return obj
        return self.pipe.recv()

    def barrier(self, name: str | None = None) -> None:
        """Return at once, since all ranks have met."""


class Child:
    """Forked process with the interface of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def run_rank(rank: int, children: list[Any], pipe: Connection, work: Work, minutes: float) -> tuple[int, str]:
    """Return exit status and sentence of a rank that does this work."""
    fabric: Any = Lightning(rank, children, pipe)
    try:
        with launch_ranks(fabric, minutes) as ranks:
            work(ranks, rank)
    except RankLostError as error:
        return 2, str(error) if error.is_reported else ""
    except UserError as error:
        return 2, str(error) if rank == 0 else ""
    return 0, ""


def both(tmp_path: Path, work: Work, minutes: float = 60.0) -> tuple[tuple[int, str], tuple[int, str]]:
    """Return status and sentence of two forked ranks."""
    ends: tuple[Any, Any] = Pipe(), Pipe()
    first = os.fork()
    if first == 0:
        second = os.fork()
        rank, children = (1, []) if second == 0 else (0, [Child(second)])
        if rank == 0:
            (tmp_path / "second").write_text(str(second))
        (tmp_path / f"pid{rank}").write_text(str(os.getpid()))
        status, sentence = 99, ""
        try:
            status, sentence = run_rank(rank, children, ends[0][rank], work, minutes)
        finally:
            (tmp_path / f"end{rank}").write_text(f"{status} {sentence}")
            os._exit(status)
    deadline = time.monotonic() + 8
    while not all((tmp_path / f"end{rank}").exists() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)
        if os.waitpid(first, os.WNOHANG)[0]:
            time.sleep(processes.GRACE_S + 2)
            break
    for rank in (0, 1):
        with suppress(ProcessLookupError):
            # A rank that was stopped would stay for ever.
            os.kill(int((tmp_path / f"pid{rank}").read_text()), signal.SIGKILL)
    outcomes = []
    for rank in (0, 1):
        text = (tmp_path / f"end{rank}").read_text() if (tmp_path / f"end{rank}").exists() else "-9 "
        outcomes.append((int(text.split(" ")[0]), text.partition(" ")[2]))
    return outcomes[0], outcomes[1]


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BEAT_S", 0.1)
    monkeypatch.setattr(processes, "GRACE_S", 2.0)


def work_alone(seconds: float) -> Work:
    """Let the first rank come late to a meeting."""

    def work(ranks: Ranks, rank: int) -> None:
        if rank == 0:
            time.sleep(seconds)
        assert ranks.broadcast("hello" if rank == 0 else None) == "hello"
        ranks.barrier()

    return work


def signal_other(tmp_path: Path, victim: int, number: signal.Signals) -> Work:
    """Let one rank send the other a signal and then wait for it, as in a collective."""

    def work(ranks: Ranks, rank: int) -> None:
        ranks.barrier()
        if rank != victim:
            os.kill(int((tmp_path / f"pid{victim}").read_text()), number)
            ranks.barrier()
        time.sleep(60)

    return work


def test_ranks_wait_for_one_that_works_alone(tmp_path: Path) -> None:
    """Ranks wait for one that works alone, longer than for a rank that sends no heartbeat."""
    assert both(tmp_path, work_alone(1.5), minutes=0.5 / 60) == ((0, ""), (0, ""))


@pytest.mark.parametrize(
    ("victim", "number", "expected"),
    [
        (1, signal.SIGKILL, r"Rank 1 of 2 was ended by SIGKILL \(often: out of memory\), so the run ends\. "),
        (
            1,
            signal.SIGSTOP,
            r"Rank 1 of 2 (has sent no heartbeat|has not arrived) for trainer\.timeout_min=0\.02 minutes",
        ),
        (0, signal.SIGKILL, r"Rank 0 of 2 has ended or hangs, so the run ends\. "),
        (0, signal.SIGSTOP, r"Rank 0 of 2 has sent no heartbeat for trainer\.timeout_min=0\.02 minutes"),
    ],
)
def test_the_other_rank_names_the_one_that_is_lost(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], victim: int, number: signal.Signals, expected: str
) -> None:
    """The other rank names the lost one.

    The rank raises the sentence, or prints it and ends where a store that hangs would hold the rank for ever.
    """
    status, raised = both(tmp_path, signal_other(tmp_path, victim, number), minutes=0.02)[1 - victim]
    sentence = raised or capfd.readouterr().err.strip()
    assert status in (2, -9)
    assert re.match(expected, sentence)
    assert sentence.endswith(CONTINUES)
    assert sentence.count("Rank") == 1


def test_the_sentence_of_another_rank_reaches_the_first(tmp_path: Path) -> None:
    def work(ranks: Ranks, rank: int) -> None:
        if rank == 1:
            raise UserError("the disk of this machine is full")
        ranks.barrier()

    assert both(tmp_path, work)[0] == (
        2,
        "Rank 1 of 2 ended with status 2: the disk of this machine is full, so the run ends. " + CONTINUES,
    )


def test_a_rank_that_lives_and_does_not_arrive_is_named(tmp_path: Path) -> None:
    def work(ranks: Ranks, rank: int) -> None:
        if rank == 1:
            time.sleep(4)
        ranks.barrier()

    status, sentence = both(tmp_path, work, minutes=0.01)[0]
    assert (status, sentence.startswith("Rank 1 of 2 has not arrived for trainer.timeout_min=0.01 minutes")) == (
        2,
        True,
    )


def test_a_run_whose_rank_is_killed_ends_with_that_sentence(tmp_path: Path) -> None:
    """A whole command whose rank is killed ends with that sentence.

    Lightning starts the ranks, and its own observer would end the first without a message.
    """
    arguments = ("experiment=smoke", "trainer=ddp", "trainer.accelerator=cpu", "optim.steps=3000", "evaluate.every=0")
    env = os.environ | {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "run.py"), *arguments, "hydra.run.dir=out"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log, text=True)
        curves, deadline = tmp_path / "out" / "curves.csv", time.monotonic() + 120
        while not (curves.exists() and "finetune" in curves.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        second = next(c for c in children if b"train_ddp_process_1" in Path(f"/proc/{c}/cmdline").read_bytes())
        os.kill(int(second), signal.SIGKILL)
        assert process.wait(timeout=60) == 2
    output = (tmp_path / "log").read_text()
    assert output.count("Rank 1 of 2 was ended by SIGKILL") == output.count(CONTINUES) == 1
    assert "Traceback" not in output
    assert "frame #" not in output
