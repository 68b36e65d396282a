"""Server of completions on this machine: scripted replies in a test, or a model's answers as a command.

    python tests/helpers/completion_server.py FOLDER PORT [WORD]

Without a word the model in the folder answers, by the library's own generation. A word is the answer to every prompt.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

sys.path[:0] = [str(Path(__file__).parents[1])]

from helpers.serving import Quiet  # noqa: E402  # the program finds it by the line above

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any] | bytes]]


class Completions(Quiet):
    """Server of completions. `reply` turns the body of a request into a status and a body."""

    reply: ClassVar[Reply]
    models: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        is_list = self.path == "/v1/models"
        self._send(200 if is_list else 404, {"data": self.models} if is_list else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"authorization": self.headers["Authorization"], "path": self.path})
        self._send(*type(self).reply(body))

    def _send(self, status: int, body: dict[str, Any] | bytes) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)


def completion(text: str, reason: str = "stop", **usage: int) -> dict[str, Any]:
    """Return the body of a reply."""
    body = {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": reason}]}
    return body | ({"usage": usage} if usage else {})


def model_reply(folder: Path, takes_ids: bool = True) -> Reply:
    """Return the replies of the model in a folder, one prompt at a time, as `transformers serve` generates them."""
    from threading import Lock

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lock = Lock()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        prompt = body["prompt"]
        if not isinstance(prompt, str) and not takes_ids:
            return 400, {"error": {"message": "prompt must be a string"}}
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        with lock, torch.no_grad():
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=body["max_tokens"],
                do_sample=False,
                stop_strings=body["stop"],
                tokenizer=tokenizer,
            )[0, len(ids) :].tolist()
        is_complete = len(output) < body["max_tokens"] or output[-1] == tokenizer.eos_token_id
        text = str(tokenizer.decode(output, skip_special_tokens=True))
        counts = {"prompt_tokens": len(ids), "completion_tokens": len(output)}
        return 200, completion(text, "stop" if is_complete else "length", **counts)

    return reply


def main() -> None:
    """Serve until the process ends."""
    import http.server

    folder, port, *words = sys.argv[1:]
    if words == ["broken"]:
        sys.exit("first line\nthe weights are broken")
    if words == ["asleep"]:
        time.sleep(1000)
    reply = (lambda _: (200, completion(words[0]))) if words else model_reply(Path(folder))
    Completions.reply = staticmethod(reply)
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), Completions).serve_forever()


if __name__ == "__main__":
    main()
