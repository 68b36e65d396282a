"""Reading of chat completions: text and token counts, or a description of the problem. Start at `read_completion`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from lisa_lightning.runtime.endpoint_reply import read_reply

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
    reply = read_reply(chunks, seconds)
    if reply.problem is not None:
        return Completion(problem=reply.problem)
    text = _text(reply.value)
    problem = "its JSON holds no choices[0].message with a text" if text is None else None
    return Completion(text or "", _tokens(reply.value), problem)


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
