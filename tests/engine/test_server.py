"""Servers that a run starts: ready, broken, asleep, stubborn, and stopped however the run ends."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from helpers.composing import composed
from helpers.forking import Forked
from helpers.paths import ROOT, TESTS
from lisa_lightning.engine import _server
from lisa_lightning.engine._server import run_server
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError

SERVER = TESTS / "helpers" / "completion_server.py"
STUB = [sys.executable, str(SERVER), "{model}", "{port}"]


def is_alive(process: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(process: int, seconds: float = 15) -> bool:
    until = time.monotonic() + seconds
    while is_alive(process) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_alive(process)


def processes_with(word: str) -> list[int]:
    """Return the processes whose command line contains a word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if word in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except (OSError, UnicodeDecodeError):
            continue
    return [process for process in found if process != os.getpid() and is_alive(process)]


def test_a_server_is_started_without_secrets_and_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "server.py"
    program.write_text(
        textwrap.dedent(f"""
        import os, runpy, sys
        sys.argv.append("yes")
        print(" ".join(sorted(os.environ)), flush=True)
        runpy.run_path({str(SERVER)!r}, run_name="__main__")
        """)
    )
    for name in ("WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "RANK"):
        monkeypatch.setenv(name, "7")
    log, model = tmp_path / "log", tmp_path / "a model"
    words = [sys.executable, str(program), "{model}", "{port}"]
    with run_server(words, model, log, 20, "OPENAI_API_KEY") as url:
        running = processes_with(str(model))
        assert len(running) == 2
        with urllib.request.urlopen(f"{url}/models") as reply:
            assert json.loads(reply.read()) == {"data": []}
    assert all(map(wait_for_end, running))
    names = set(log.read_text().split())
    assert names & {"WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "RANK"} == {"OPENAI_API_KEY"}


@pytest.mark.slow
def test_a_server_with_children_that_ignore_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "GRACE_S", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"
    program = tmp_path / "server.sh"
    program.write_text(f"{sys.executable} -c '{stubborn}' $1 &\nexec {sys.executable} {SERVER} $1 $2 yes\n")
    words = ["sh", str(program), "{model}", "{port}"]
    with run_server(words, tmp_path / "model", tmp_path / "log", 20, None):
        time.sleep(0.5)
        running = processes_with(str(tmp_path / "model"))
        assert len(running) == 3
    assert all(map(wait_for_end, running))


def test_a_server_that_breaks_is_quoted(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"status 1 \(last line of its log: the weights are broken\)\. Fix: see .*log"),
        run_server([*STUB, "broken"], tmp_path, tmp_path / "log", 20, None),
    ):
        pass


def test_a_server_that_is_never_ready_is_stopped(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"not ready after engine\.start_timeout_s=1 seconds \(its log is empty\)\. Fix"),
        run_server([*STUB, "asleep"], tmp_path / "sleeper", tmp_path / "log", 1, None),
    ):
        pass
    assert processes_with(str(tmp_path / "sleeper")) == []


def test_an_error_of_a_server_that_ended_names_its_end(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"the server ended with status 137 "),
        run_server([*STUB, "yes"], tmp_path / "model", tmp_path / "log", 20, None),
    ):
        kill_and_fail(str(tmp_path / "model"))


def kill_and_fail(model: str) -> None:
    """Kill the server of a model, and fail as a request does."""
    (server,) = (p for p in processes_with(model) if "_guard" not in Path(f"/proc/{p}/cmdline").read_text())
    os.kill(server, signal.SIGKILL)
    assert wait_for_end(server)
    raise UserError("the request failed")


def test_a_server_ends_with_a_run_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from lisa_lightning.engine._server import run_server\n"
        "with run_server(sys.argv[1:], Path('killed model'), Path('log'), 20, None): print('ready', flush=True); "
        "time.sleep(1000)"
    )
    arguments = [sys.executable, "-c", program, *STUB, str(tmp_path)]
    with subprocess.Popen(arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        running = [p for p in processes_with(str(tmp_path)) if p != process.pid]
        assert len(running) == 2
        process.kill()
    assert all(map(wait_for_end, running))


SHORT = ["experiment=smoke", "optim.steps=4", "align.optim.steps=2", "evaluate.every=0"]


def served(*words: str) -> list[str]:
    command = " ".join([*STUB, *words])
    return ["engine=endpoint", f"engine.command='{command}'"]


def answers(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "responses.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "origin"} for line in lines]


@pytest.mark.slow
def test_a_run_starts_a_server_for_each_model_and_its_answers_are_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cache = f"cache_dir={tmp_path / 'cache'}"
    local = run(composed([*SHORT, cache], tmp_path / "local"))
    metrics = run(composed([*SHORT, cache, *served()], tmp_path / "served"))
    assert answers(tmp_path / "served") == answers(tmp_path / "local")
    assert {a["model"] for a in answers(tmp_path / "local")} == {"aligned", "final"}
    assert "engine" not in local
    assert metrics["engine"].startswith("endpoint by ")
    assert "completion_server.py {model} {port}" in metrics["engine"]
    assert "completion_server.py {model} {port}" in " ".join(capsys.readouterr().out.split())
    for name in ("report.html", "adapter/README.md"):
        assert "completion_server.py" in (tmp_path / "served" / name).read_text()
        assert "completion_server.py" not in (tmp_path / "local" / name).read_text()
    assert {f"server_{name}.log" for name in ("aligned", "final")} <= {f.name for f in (tmp_path / "served").iterdir()}
    assert processes_with("completion_server.py") == []
    evaluations = list((tmp_path / "cache" / "evaluate").glob("*/"))
    assert len(evaluations) == 4
    assert {f.name for folder in evaluations for f in folder.iterdir()} == {
        *("key.json", "stage.json", "responses.jsonl"),
    }
    # Another number of requests at once changes no answer, so that no server is started.
    again = run(composed([*SHORT, cache, *served(), "engine.concurrency=3"], tmp_path / "again"))
    assert not (tmp_path / "again" / "server_final.log").exists()
    assert again["engine"] == metrics["engine"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_an_interrupted_run_stops_its_server(forked: Forked, tmp_path: Path, number: signal.Signals) -> None:
    env = {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache")}
    words = [*SHORT, "stages=[evaluate]", "hydra.run.dir=out", *served("asleep", str(tmp_path))]
    process = forked.start(words, tmp_path, env)
    until = time.monotonic() + 90
    while not (running := [p for p in processes_with(f"asleep\0{tmp_path}") if p != process]):
        assert time.monotonic() < until
        time.sleep(0.1)
    os.kill(process, number)
    done = forked.wait(process)
    assert done.returncode == 128 + number
    assert all(map(wait_for_end, running))


@pytest.mark.slow
def test_greedy_answers_of_transformers_serve_are_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="transformers serve needs fastapi and uvicorn")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cache = f"cache_dir={tmp_path / 'cache'}"
    program = "from transformers.cli.transformers import main; main()"
    command = f'{sys.executable} -c "{program}" serve {{model}} --port {{port}}'
    run(composed([*SHORT, cache], tmp_path / "local"))
    run(composed([*SHORT, cache, "engine=endpoint", f"engine.command='{command}'"], tmp_path / "served"))
    assert answers(tmp_path / "served") == answers(tmp_path / "local")
