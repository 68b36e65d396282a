"""Two nodes of one process each, on this machine, as torchrun, srun and Lightning start them."""

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from socket import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities.rank_zero import rank_zero_only

from helpers.forking import Forked
from lisa_lightning.callbacks.stop_signal import StopSignal
from lisa_lightning.config.settings import TrainerSettings
from lisa_lightning.runtime import launch, shared_folders
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.ranks import OneRank, is_first_of_node, is_rank_zero
from lisa_lightning.runtime.shared_folders import require_shared_folders
from lisa_lightning.runtime.stop import STOP_SIGNALS, Stopped

SMALL = ("experiment=smoke", "optim.steps=6", "align.optim.steps=2", "evaluate.every=0", "judge=refusal")
NODES = (*SMALL, "trainer=ddp", "trainer.num_nodes=2", "trainer.devices=1", "trainer.accelerator=cpu")
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "runs", "SLURM_NODELIST": "127.0.0.1"}


def of_torchrun(node: int) -> dict[str, str]:
    """Return the variables of torchrun."""
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}
    ranks = {"RANK": str(node), "LOCAL_RANK": "0", "GROUP_RANK": str(node)}
    return sizes | ranks | {"TORCHELASTIC_RUN_ID": "x"}


def of_srun(node: int) -> dict[str, str]:
    """Return the variables of srun."""
    sizes = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2"}
    return SLURM | sizes | {"SLURM_PROCID": str(node), "SLURM_LOCALID": "0", "SLURM_NODEID": str(node)}


def of_lightning(node: int) -> dict[str, str]:
    """Return the variables that Lightning's page on clusters names."""
    return {"NODE_RANK": str(node)}


LAUNCHERS = {"torchrun": of_torchrun, "srun": of_srun, "lightning": of_lightning}
Nodes = Callable[..., list[tuple[int, str]]]


@pytest.fixture
def nodes(tmp_path: Path, forked: Forked) -> Nodes:
    """Return a function that runs a command on two nodes, and returns exit status and stderr of each."""

    def run(launcher: str, caches: tuple[str, str] = ("cache", "cache")) -> list[tuple[int, str]]:
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WANDB_MODE": "disabled", "HOME": str(tmp_path)}
        started = []
        for node in range(2):
            env = common | LAUNCHERS[launcher](node) | {"LISA_CACHE": str(tmp_path / caches[node])}
            started.append(forked.start([*NODES], tmp_path, env, "helpers.impatient"))
            time.sleep(1.1)  # so that their clocks name different folders
        return [(done.returncode, done.stderr) for done in map(forked.wait, started)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_nodes_make_one_run_in_one_folder(launcher: str, nodes: Nodes, tmp_path: Path) -> None:
    ends = nodes(launcher)
    assert [status for status, _ in ends] == [0, 0], ends
    (folder,) = (tmp_path / "outputs" / "smoke").iterdir()
    assert (folder / "report.html").exists()
    assert not [*folder.glob(".shared*"), *(tmp_path / "cache").glob(".shared*")]


@pytest.mark.slow
def test_nodes_with_a_cache_each_are_told_so_at_once(nodes: Nodes, tmp_path: Path) -> None:
    ends = nodes("lightning", caches=("one", "other"))
    assert [status for status, _ in ends] == [2, 2]
    for _, error in ends:
        assert f"cache_dir={tmp_path / 'other'}: node {os.uname().nodename} does not see what the first node" in error
        assert "Fix: set cache_dir to a folder on a file system that all nodes share" in error
        assert "Traceback" not in error


@pytest.mark.slow
def test_a_warning_of_slurm_ends_a_run_that_goes_on_exactly_and_leaves_nothing_in_the_way(
    tmp_path: Path, forked: Forked
) -> None:
    """A file of Lightning's own requeueing lies in the working directory, as one of another run would."""
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"of another run")
    one = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    env = SLURM | one | {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache")}
    words = [*SMALL, "optim.steps=60", "checkpoint.every=2", "hydra.run.dir=run"]
    process = forked.start(words, tmp_path, env)
    checkpoint, deadline = tmp_path / "run" / "checkpoints" / "finetune.ckpt", time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process, signal.SIGUSR1)
    ended = forked.wait(process)
    assert (ended.returncode, "Stopped by SIGUSR1" in ended.stderr) == (128 + signal.SIGUSR1, True), ended.stderr
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 < steps < 60
    assert [file.name for file in tmp_path.glob("hpc_ckpt*")] == ["hpc_ckpt_1.ckpt"]
    again, whole = [*words, "resume=true"], [*words[:-1], "hydra.run.dir=whole"]
    other_cache = {"LISA_CACHE": str(tmp_path / "other")}
    for command, more in ((again, {}), (whole, other_cache)):
        done = forked.run(command, tmp_path, env | more)
        assert done.returncode == 0, done.stderr[-3000:]
    adapters = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize(
    ("variables", "zero", "first"),
    [
        ({}, True, True),
        (of_torchrun(0), True, True),
        (of_torchrun(1), False, True),
        (of_torchrun(0) | {"SLURM_PROCID": "1"}, True, True),
        (of_srun(1), False, True),
        (of_srun(1) | {"SLURM_LOCALID": "1"}, False, False),
        (of_lightning(1), False, True),
        ({"NODE_RANK": "0", "LOCAL_RANK": "1"}, False, False),
    ],
)
def test_rank_zero_is_known_before_the_ranks_connect(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], zero: bool, first: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (is_rank_zero(), is_first_of_node()) == (zero, first)


def test_a_node_that_the_run_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match=r"NODE_RANK=1 is set, and trainer\.num_nodes=1 has no such node"):
        launch.make_fabric(TrainerSettings())


def test_a_node_that_stays_alone_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other node would hold the store that this one connects to."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Fabric sets both, which other tests must not see
    monkeypatch.setattr(os, "environ", dict(os.environ) | of_lightning(1))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    monkeypatch.setattr(launch, "START_TIMEOUT", timedelta(seconds=1))
    strategy = DDPStrategy(timeout=launch.START_TIMEOUT)
    fabric = Fabric(accelerator="cpu", devices=1, num_nodes=2, strategy=strategy)
    with pytest.raises(UserError, match="The 2 processes of the run have not met within"):
        launch._meet(fabric)


def test_a_folder_that_appears_late_is_shared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_shared_folders(OneRank(), {"cache_dir": tmp_path / "new"})
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr(shared_folders, "TIMEOUT_S", 0.3)
    with pytest.raises(UserError, match=r"cache_dir=.*: node \S+ does not see"):
        shared_folders._wait_for("cache_dir", tmp_path / "absent" / "file")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_stops_training_after_the_step(number: signal.Signals) -> None:
    handlers = {one: signal.getsignal(one) for one in STOP_SIGNALS}
    stop, module = StopSignal(), SimpleNamespace(device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(world_size=1, should_stop=False)
    try:
        stop.on_train_start(trainer, module)  # type: ignore[arg-type]
        stop.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
        stop.raise_received()
        assert not trainer.should_stop
        signal.raise_signal(number)
        stop.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
    assert trainer.should_stop
    with pytest.raises(Stopped) as stopped:
        stop.raise_received()
    assert stopped.value.code == 128 + number
