"""Read a chat completion of any server: its text and its tokens, or what is wrong with it."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

MAX_REPLY_BYTES: Final = 2**24  # bytes of a reply; the longest thoughts of a model take a tenth
MAX_BILLED_TOKENS: Final = 2**53  # above it a product with a price could overflow


@dataclass(frozen=True, slots=True)
class Completion:
    """Content of a server's reply as a completion."""

    text: str = ""
    """The message; empty where the server sent none."""
    tokens: tuple[int, int] | None = None
    """Tokens of the prompt and of the message that are billed, None without a valid count."""
    problem: str | None = None
    """Why it is no completion, None where it is one."""


def read_completion(chunks: Iterable[bytes], seconds: float) -> Completion:
    """Return the completion that the chunks of a response hold.

    Args:
        chunks: the body as it arrives.
        seconds: the time after which no more of it is read.
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
    # The classes belong to the HTTP library that openai uses; each one means a broken connection or encoding.
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
    """Return the first message's text, "" where it has none, None where the reply is no completion."""
    match reply:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return text
        case {"choices": [{"message": {"content": [*parts]}}, *_]}:
            return _joined(parts)
        case {"choices": [{"message": {"content": None}}, *_]}:
            return ""
        case _:
            return None


def _joined(parts: list[Any]) -> str | None:
    """Return the text parts as one text; parts of other types, such as thoughts, are left out."""
    texts = []
    for part in parts:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(other)} if other != "text":
                pass
            case _:
                return None
    return "".join(texts)


def _tokens(reply: Any) -> tuple[int, int] | None:
    match reply:
        case {"usage": {"prompt_tokens": prompt, "completion_tokens": message}}:
            # A bool is an int too, so isinstance would not do. No prompt is free of tokens: a 0 was not counted.
            if type(prompt) is int and type(message) is int and prompt > 0 and message >= 0:
                return min(prompt, MAX_BILLED_TOKENS), min(message, MAX_BILLED_TOKENS)
    return None
