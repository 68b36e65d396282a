"""Reading of chat completions: text and token counts, or a description of the problem. Start at `read_completion`."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

MAX_REPLY_BYTES: Final = 2**24
"""Maximum size of a reply. The longest thoughts of a model take a tenth of it."""
MAX_BILLED_TOKENS: Final = 2**53
"""Maximum token count, above which a product with a price could overflow."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A server's reply, read as a completion."""

    text: str = ""
    """The message; "" if the server sent none."""
    tokens: tuple[int, int] | None = None
    """Billed tokens of the prompt and of the message; None without a valid count."""
    problem: str | None = None
    """Description of why the reply is no completion; None if it is one."""


def read_completion(chunks: Iterable[bytes], seconds: float) -> Completion:
    """Return the completion in the chunks of a response, or its `problem`.

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
                return Completion(problem=f"it is longer than {MAX_REPLY_BYTES} bytes")
            if time.monotonic() > deadline:
                return Completion(problem=f"it took longer than {seconds:g} s")
    # The classes belong to the HTTP library of openai. Each of them means a broken connection or encoding.
    except Exception as error:
        return Completion(problem=f"it broke off: {type(error).__name__}")
    return _parsed(bytes(body))


def _parsed(body: bytes) -> Completion:
    if not body.strip():
        return Completion(problem="it is empty")
    try:
        reply = json.loads(body)
    # ValueError covers broken JSON, invalid UTF-8 and integers of thousands of digits.
    except (ValueError, RecursionError):
        return Completion(problem="it is no valid JSON")
    text = _text(reply)
    problem = "its JSON holds no choices[0].message with a text" if text is None else None
    return Completion(text or "", _tokens(reply), problem)


def _text(reply: Any) -> str | None:
    """Return the first message's text, "" if it has none, None if the reply is no completion."""
    match reply:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return text
        case {"choices": [{"message": {"content": [*items]}}, *_]}:
            return _joined_text(items)
        case {"choices": [{"message": {"content": None}}, *_]}:
            return ""
        case _:
            return None


def _joined_text(items: list[Any]) -> str | None:
    """Return the joined text items without items of other types, such as thoughts; None if an item is invalid."""
    texts = []
    for item in items:
        match item:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(kind)} if kind != "text":
                pass
            case _:
                return None
    return "".join(texts)


def _tokens(reply: Any) -> tuple[int, int] | None:
    match reply:
        case {"usage": {"prompt_tokens": prompt, "completion_tokens": message}}:
            # A bool is an int too, so isinstance is not enough. Every prompt has tokens: a 0 means no count.
            if type(prompt) is int and type(message) is int and prompt > 0 and message >= 0:
                return min(prompt, MAX_BILLED_TOKENS), min(message, MAX_BILLED_TOKENS)
    return None
