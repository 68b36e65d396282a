"""A server that a run starts and stops: `run_server`."""

import http.client
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Final

from lisa_lightning.engine import _guard
from lisa_lightning.runtime.endpoint_url import masked
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import reraise_write_errors

KEY: Final = "engine.command"
HOST: Final = "127.0.0.1"
POLL_S: Final = 0.2
GRACE_S = 10.0
"""Seconds that a server has to stop before it is killed."""
END_S: Final = 1.0
"""Seconds after a failed request in which the end of the server counts as its cause."""
LOG_TAIL_BYTES: Final = 20_000
MAX_QUOTED_CHARS: Final = 300
"""Maximum number of characters of a log's line in a message."""
PLACEHOLDERS: Final = ("{model}", "{port}")
DROPPED_VARIABLES: Final = frozenset(
    {
        # They describe the ranks of the run, and a server would take them for its own.
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"),
        # The server needs none of these secrets, and might write them into its log.
        *("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY"),
        *("OPENAI_BASE_URL", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    }
)
"""Environment variables that a server does not receive."""
SECRET_NAME: Final = re.compile("KEY|TOKEN|SECRET|PASSWORD")
"""Part of the name of an environment variable whose value no message may quote."""


def split_command(command: str) -> list[str]:
    """Return the words of a command with placeholders.

    Args:
        command: config key `engine.command`.

    Raises:
        UserError: if a quote is open, a placeholder is missing, or the program does not exist.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UserError(f"{KEY}={_shortened(command)}: {error}. Fix: close the quote") from error
    for placeholder in PLACEHOLDERS:
        if not any(placeholder in word for word in words):
            raise UserError(
                f"{KEY}={_shortened(command)}: it lacks {placeholder}. Fix: as in "
                "engine.command='vllm serve {model} --port {port}'"
            )
    if shutil.which(words[0]) is None:
        raise UserError(
            f"{KEY}: there is no program {_shortened(words[0])}. Fix: install it, or name its path, such as "
            "/envs/vllm/bin/vllm for one in another environment"
        )
    return words


@contextmanager
def run_server(words: list[str], model: Path, log: Path, timeout_s: float, key_variable: str | None) -> Iterator[str]:
    """Start a server of a model, yield its URL as soon as it is ready, and stop it.

    The server leads no terminal, so that Ctrl-C reaches the run alone, which then stops the server. It ends with this
    process even after a SIGKILL.

    Args:
        words: words of the command, with placeholders.
        model: folder of the model, which replaces `{model}`. A free port replaces `{port}`.
        log: file that receives the output of the server.
        timeout_s: seconds until the server must be ready.
        key_variable: environment variable of the API key, which the server receives too; None without a key.

    Raises:
        UserError: if the server is not ready in time, or ends before it is stopped.
    """
    port = _free_port()
    filled = [word.replace("{model}", str(model)).replace("{port}", str(port)) for word in words]
    env = {k: v for k, v in os.environ.items() if k not in DROPPED_VARIABLES or k == key_variable}
    with reraise_write_errors(log):
        file = log.open("wb")
    with file:
        guard = subprocess.Popen(
            [sys.executable, "-I", str(Path(_guard.__file__)), str(GRACE_S), *filled],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
    try:
        _wait_until_ready(guard, port, log, timeout_s)
        yield f"http://{HOST}:{port}/v1"
    except UserError as error:
        # A failed request may be the first sign of a server that has just ended.
        with suppress(subprocess.TimeoutExpired):
            raise _ended_error(guard.wait(END_S), log) from error
        raise
    finally:
        _stop(guard)


def _free_port() -> int:
    """Return a port that is free now. Servers of killed runs may occupy others."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        return int(free.getsockname()[1])


def _wait_until_ready(guard: "subprocess.Popen[bytes]", port: int, log: Path, timeout_s: float) -> None:
    deadline = monotonic() + timeout_s
    while not _is_ready(port):
        if (status := guard.poll()) is not None:
            raise _ended_error(status, log)
        if monotonic() > deadline:
            raise UserError(
                f"{KEY}: the server was not ready after engine.start_timeout_s={timeout_s:g} seconds "
                f"({_last_line(log)}). Fix: raise it, or see {log}"
            )
        sleep(POLL_S)
    # Another process may answer at this port.
    if (status := guard.poll()) is not None:
        raise _ended_error(status, log)


def _is_ready(port: int) -> bool:
    """Return whether the server answers requests. Not all servers have both paths."""
    health = _status(port, "/health")
    return health == 200 or (health in (404, 405) and _status(port, "/v1/models") == 200)


def _status(port: int, path: str) -> int:
    """Return the status of a response, 0 without one."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _stop(guard: "subprocess.Popen[bytes]") -> None:
    """Stop the server and its children: SIGTERM, and SIGKILL after a while."""
    assert guard.stdin is not None
    try:
        guard.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            guard.wait(GRACE_S + 5)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


def _ended_error(status: int, log: Path) -> UserError:
    return UserError(
        f"{KEY}: the server ended with status {status} ({_last_line(log)}). Fix: see {log}, correct the command, or "
        "repeat it with resume=true; finished answers are kept"
    )


def _last_line(log: Path) -> str:
    """Return the last line of the server's log for a message."""
    content = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    lines = [line for line in map(printable, content.splitlines()) if line]
    secrets = [value for name, value in os.environ.items() if value and SECRET_NAME.search(name)]
    return f"last line of its log: {_shortened(masked(lines[-1], secrets))}" if lines else "its log is empty"


def _shortened(text: str) -> str:
    text = printable(text)
    return text if len(text) <= MAX_QUOTED_CHARS else f"{text[:MAX_QUOTED_CHARS]}..."
