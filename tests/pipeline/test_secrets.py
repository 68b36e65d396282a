"""Judging by an endpoint as a command: no secret reaches a file or a stream, and Ctrl-C does not wait for replies."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.chat_server import Server
from helpers.forking import Forked

SECRETS = {
    "OPENAI_API_KEY": "sk-SECRETKEY-0123456789abcdef",
    "HF_TOKEN": "hf_SECRETTOKEN0123456789abcdef",
    "WANDB_API_KEY": "SECRETWANDB" + "0123456789abcdef" * 2,
}
PASSWORD, QUERY = "SECRETPASSWORD", "SECRETQUERY"


@pytest.mark.slow
def test_no_secret_is_written_anywhere(forked: Forked, url: str, tmp_path: Path) -> None:
    """No file and no stream contains a key, a token, a password or a query.

    W&B is offline, loggers are at DEBUG, and the judge's endpoint has a password and echoes what it is sent.
    """
    Server.reply = staticmethod(lambda _: (200, "Score: 2"))
    address = url.replace("://", f"://user:{PASSWORD}@") + f"?token={QUERY}"
    more = {"WANDB_MODE": "offline", "OPENAI_BASE_URL": address, "OPENAI_LOG": "debug", "NO_PROXY": "127.0.0.1"}
    env = SECRETS | more | {"LISA_CACHE": str(tmp_path / "cache")}
    judge = ["judge=openai", *(f"judge.openai.usd_per_million_{side}=1" for side in ("input", "output"))]
    judge += ["judge.openai.model=m", "judge.openai.retries=0"]
    short = ["experiment=smoke", "optim.steps=2", "align.optim.steps=2", "evaluate.every=0", "hydra.verbose=true"]
    done = [forked.run([*short, *judge, "hydra.run.dir=run"], tmp_path, env)]
    assert done[0].returncode == 0, done[0].stderr
    assert {entry["path"].partition("?")[0] for entry in Server.asked} == {"/v1/chat/completions"}

    def echo(body: dict[str, Any]) -> tuple[int, str]:
        return 401, f"no such key {SECRETS['OPENAI_API_KEY'][:14]} at {address} {json.dumps(body['authorization'])}"

    Server.parameters = staticmethod(echo)
    (tmp_path / "answers.jsonl").write_text('{"prompt": "request", "response": "another answer"}\n')
    again = ["stages=[judge]", *judge, "responses=answers.jsonl", "hydra.run.dir=refused"]
    done.append(forked.run(again, tmp_path, env))
    assert done[1].returncode == 2
    done.append(forked.run(["-m", *short[:4], *judge, "seed=1,2"], tmp_path, env))

    written = {str(file): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any("wandb" in name for name in written)
    written |= {f"stream {i}": (d.stdout + d.stderr).encode() for i, d in enumerate(done)}
    found = [name for name, content in written.items() if b"SECRET" in content]
    assert not found


@pytest.mark.slow
def test_ctrl_c_does_not_wait_for_replies_under_way(forked: Forked, url: str, tmp_path: Path) -> None:
    def slow(_: str) -> tuple[int, str]:
        time.sleep(15)
        return 200, "Score: 2"

    Server.reply = staticmethod(slow)
    lines = [json.dumps({"prompt": "request", "response": f"answer {i}"}) for i in range(9)]
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    judge = ["judge=openai", *(f"judge.openai.usd_per_million_{side}=1" for side in ("input", "output"))]
    asked = ["stages=[judge]", *judge, "judge.openai.model=m", "responses=answers.jsonl", "hydra.run.dir=out"]
    env = SECRETS | {"OPENAI_BASE_URL": url, "NO_PROXY": "127.0.0.1", "LISA_CACHE": str(tmp_path / "cache")}
    process = forked.start(asked, tmp_path, env)
    until = time.monotonic() + 60
    while len(Server.asked) < 4 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.2)
    began = time.monotonic()
    os.kill(process, signal.SIGINT)
    done = forked.wait(process)
    assert time.monotonic() - began < 8
    assert (done.returncode, "Stopped by Ctrl-C" in done.stderr) == (128 + signal.SIGINT, True)
    assert "Traceback" not in done.stderr
