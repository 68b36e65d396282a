"""Stand-in on this machine for the endpoint of a judge, and settings of a judge that asks it."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, ClassVar

import pytest
from omegaconf import OmegaConf

from helpers.paths import CONF
from helpers.serving import Quiet, serving
from lisa_lightning.judge.base import Verdict

KEY = "sk-test-0123456789"
JUDGES = CONF / "judge"
Reply = Callable[[str], tuple[int, str | bytes]]


class Server(Quiet):
    """Server of chat completions.

    `reply` turns a question into a status and content: a message, a whole body, or a new place.
    """

    reply: ClassVar[Reply]
    parameters: ClassVar[Callable[[dict[str, Any]], tuple[int, str | bytes] | None]]
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body["authorization"], body["path"] = self.headers["Authorization"], self.path
        body["host"] = self.headers["Host"]
        Server.asked.append(body)
        status, content = type(self).parameters(body) or type(self).reply(body["messages"][-1]["content"])
        answer: dict[str, Any] = {"error": {"message": content}}
        if status == 200:
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            answer = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        data = content if isinstance(content, bytes) else json.dumps(answer).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Retry-After": "0"}
        if 300 <= status < 400:
            headers["Location"] = str(content)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    Server.asked, Server.parameters = [], staticmethod(lambda _: None)
    with serving(Server) as address:
        yield f"{address}/v1"


def settings(name: str, url: str, **more: Any) -> dict[str, Any]:
    config: Any = OmegaConf.load(JUDGES / f"{name}.yaml")
    shipped: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(JUDGES / "_endpoint.yaml"), config[name]))
    del shipped["_target_"]
    prices = {"usd_per_million_input": 1.0, "usd_per_million_output": 10.0}
    return shipped | {"model": "m", "base_url": url, "retries": 2} | prices | more


def told(verdicts: Iterator[Verdict | None], count: int | None = None) -> list[Verdict]:
    """Return all verdicts or the first `count`, and require that none failed."""
    found = list(islice(verdicts, count))
    assert None not in found
    return [v for v in found if v is not None]
