"""Commands in forks of one process that has imported everything.

A run thus costs only its own work, without the start of Python, torch and the judge's fit.

    python -m helpers.forking        one request a line in, one answer a line out (both JSON)

`conftest.py` gives tests the process as the fixture `forked`; `killing.py` forks by itself. Needs OMP_NUM_THREADS=1: a
thread pool does not survive a fork.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import socket
from typing import Any

from helpers.paths import ROOT, TESTS

RUN = str(ROOT / "run.py")


def warm_up() -> None:
    """Do once what every run would repeat: imports, the fit of a judge, and the first use of libraries that cache."""
    sys.path.insert(0, str(ROOT))
    import lisa_lightning

    for module in pkgutil.walk_packages(lisa_lightning.__path__, "lisa_lightning."):
        # A program is imported by each child: run.py's sets variables of the environment.
        if module.name != "lisa_lightning.pipeline.command" and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("datasets", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    _first_uses()
    gc.collect()
    gc.freeze()  # else every collection in a child goes through all of it again


def _first_uses() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lisa_lightning.config.settings import Lora
    from lisa_lightning.judge.embedded import EmbeddedJudge, Pair
    from lisa_lightning.model.lora import attach
    from lisa_lightning.report.svg import BLUE, Axis, Line, Plot, draw_figure

    list(EmbeddedJudge().verdicts([Pair("", "")]))
    sizes: dict[str, Any] = {
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    attach(LlamaForCausalLM(LlamaConfig(**sizes)), Lora(r=1, alpha=1, dropout=0.0, targets="all-linear"), seed=0)
    draw_figure(Plot("a", "a", "a", "a", [Line([(0.0, 0.0), (1.0, 1.0)], BLUE)], Axis("a", 0.0, 1.0)))


def fork(arguments: list[str], log: Path, patch: Callable[[], object] | None = None, program: str = RUN) -> int:
    """Start `python run.py ARGUMENTS` in a child that writes into LOG.out and LOG.err, and return its process id.

    Args:
        patch: called in the child before the command.
        program: a file in place of run.py, or the name of a module.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        # A background job of a shell ignores Ctrl-C, and its children would too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{log}.{end}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        if patch is not None:
            patch()
        sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
        sys.argv = [program, *arguments]
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # those that its import would read
        rank = next((os.environ[name] for name in names if name in os.environ), "0")
        rank_zero_only.rank = int(rank)  # type: ignore[attr-defined]
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(child: int) -> int:
    """Return the exit status of a child, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Forked:
    """Handle of the process for tests, which runs `python run.py` like `subprocess`, but in a fork."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.forking"],
            cwd=TESTS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment({}),
        )
        self._logs: dict[int, Path] = {}

    def start(self, arguments: list[str], cwd: Path, env: Mapping[str, str], program: str = RUN) -> int:
        """Start a command, and return its process id while it runs. See `fork` for its program."""
        log = cwd / f"forked-{len(self._logs)}"
        child = self._ask(arguments=arguments, cwd=str(cwd), env=environment(env), log=str(log), program=program)
        self._logs[child] = log
        return child

    def wait(self, child: int) -> "subprocess.CompletedProcess[str]":
        """Wait for a command, and return its exit status and its output."""
        status, log = self._ask(wait=child), self._logs[child]
        said = [Path(f"{log}.{end}").read_text(encoding="utf-8") for end in ("out", "err")]
        return subprocess.CompletedProcess([], status, *said)

    def run(
        self, arguments: list[str], cwd: Path, env: Mapping[str, str], program: str = RUN
    ) -> "subprocess.CompletedProcess[str]":
        """Start a command, and wait for it."""
        return self.wait(self.start(arguments, cwd, env, program))

    def run_ranks(self, arguments: list[str], cwd: Path, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        """Run a command on two ranks, started as by torchrun, and return the result of the first."""
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            port = {"MASTER_PORT": str(free.getsockname()[1])}
        second = [*arguments, "hydra.output_subdir=null"]
        first, other = (
            self.start(own, cwd, {**env, **port, "LOCAL_RANK": str(rank)})
            for rank, own in enumerate((arguments, second))
        )
        done = self.wait(first)
        if done.returncode:
            os.kill(other, signal.SIGKILL)  # it might wait for the first
        self.wait(other)
        return done

    def close(self) -> None:
        """End the process by closing its input."""
        self._process.communicate()

    def _ask(self, **request: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of this process without W&B's settings, which a test has to choose."""
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"OMP_NUM_THREADS": "1"} | dict(more)


def started(arguments: list[str], cwd: Path, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own, as a user starts it, and require success."""
    done = subprocess.run(
        [sys.executable, RUN, *arguments],
        cwd=cwd,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_helper(name: str, *arguments: str, timeout: float) -> dict[str, Any]:
    """Run `python -m helpers.NAME ARGUMENTS`, and return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", f"helpers.{name}", *arguments],
        cwd=TESTS,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def run(forked: Forked, cwd: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command without W&B, with a cache in its folder."""
    return forked.run([*arguments], cwd, {"WANDB_MODE": "disabled", "LISA_CACHE": str(cwd / "cache")})


def serve() -> None:
    """Answer requests until there are none: a start with the process id, a wait with the exit status."""
    warm_up()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"])
        else:
            os.environ.clear()
            os.environ.update(request["env"])
            os.chdir(request["cwd"])
            answer = fork(request["arguments"], Path(request["log"]), program=request["program"])
        answers.write(f"{answer}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
