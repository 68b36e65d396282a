"""Reading of a server's replies with limits of size and time: `read_reply`."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

MAX_REPLY_BYTES: Final = 2**24
"""Maximum size of a reply. The longest thoughts of a model take a tenth of it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply, read as JSON."""

    value: Any = None
    """The JSON value; None with a problem."""
    problem: str | None = None
    """Description of why the reply is no JSON; None if it is."""


def read_reply(chunks: Iterable[bytes], seconds: float) -> Reply:
    """Return the JSON value in the chunks of a response, or its `problem`.

    Args:
        chunks: the body as it arrives.
        seconds: time after which reading stops.
    """
    body = bytearray()
    deadline = time.monotonic() + seconds
    try:
        for chunk in chunks:
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                return Reply(problem=f"it is longer than {MAX_REPLY_BYTES} bytes")
            if time.monotonic() > deadline:
                return Reply(problem=f"it took longer than {seconds:g} s")
    # The classes belong to the HTTP library of openai. Each of them means a broken connection or encoding.
    except Exception as error:
        return Reply(problem=f"it broke off: {type(error).__name__}")
    if not body.strip():
        return Reply(problem="it is empty")
    try:
        return Reply(json.loads(bytes(body)))
    # ValueError covers broken JSON, invalid UTF-8 and integers of thousands of digits.
    except (ValueError, RecursionError):
        return Reply(problem="it is no valid JSON")
