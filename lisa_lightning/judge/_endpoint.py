"""A judge's questions to an OpenAI-compatible endpoint, with a cost cap. Start at `Endpoint.request_all`."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Lock
from typing import Annotated, Any, Final, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import (
    STRICT,
    Concurrency,
    Count,
    Name,
    NonNegative,
    Positive,
    PublicUrl,
    Retries,
    Seconds,
    Words,
)
from lisa_lightning.judge._endpoint_reply import Completion, read_completion
from lisa_lightning.runtime.endpoint import EndpointClient, Limits, RequestRefused, Wording
from lisa_lightning.runtime.endpoint_url import EndpointURL, split_url
from lisa_lightning.runtime.errors import UserError, printable

log = logging.getLogger(__name__)
T = TypeVar("T")
BYTES_PER_TOKEN = 3
"""UTF-8 bytes per token in cost estimates. English has more, so that the estimate is an upper bound in any script."""
KEY_VARIABLE, URL_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
KEPT: Final = "Finished verdicts are kept"
HIDDEN_INPUT: Final[ConfigDict] = {**STRICT, "hide_input_in_errors": True}
"""Rules of pydantic for a judge with a URL. An error that quotes a rejected URL could show its password."""
Temperature = Annotated[int | float, Field(ge=0, le=2), Words("a number from 0 to 2")]
"""A whole number remains one, because `version` distinguishes 0 from 0.0."""


@dataclass(frozen=True, config=HIDDEN_INPUT)
class EndpointSettings:
    """Settings that all judges behind an endpoint share."""

    model: Name
    """Name of the model at the endpoint, best with a date in it."""
    base_url: PublicUrl | None
    """URL of the endpoint. null for OPENAI_BASE_URL, or OpenAI's if that is not set."""
    usd_per_million_input: NonNegative
    """Price of a million input tokens in dollars, needed for the cap."""
    usd_per_million_output: NonNegative
    """Price of a million output tokens in dollars, thoughts of the model included."""
    max_cost_usd: Positive
    """Maximum cost of all requests of a judging in dollars."""
    max_output_tokens: Count
    """Maximum tokens of a reply, thousands for a model that thinks first. The cap counts them all."""
    concurrency: Concurrency
    """Number of simultaneous requests."""
    retries: Retries
    """Retries of a request that fails temporarily."""
    timeout_s: Seconds
    """Timeout of a request in seconds."""
    temperature: Temperature | None
    """Sampling temperature. null sends none; a model that rejects it is queried without it."""


class Endpoint:
    """A model at an endpoint, with its prices and the amount spent.

    The API key is read from the environment and stored in the client alone. The URL of OPENAI_BASE_URL may contain
    user and password, which become HTTP basic authentication in place of the key, and a query, which is sent with each
    request. Neither is shown.

    Args:
        name: name of the judge, for config keys in messages.
        settings: model, URL, prices and limits.
        system: system message of every request; "" for none.

    Raises:
        UserError: if the key is missing, no HTTP header can contain it, or the URL is not valid.
    """

    def __init__(self, name: str, settings: EndpointSettings, system: str = "") -> None:
        self.system = system
        self.name, self.settings, self.model_shown = name, settings, printable(settings.model)[:100]
        self._url = _configured_url(name, settings.base_url)
        key = f"judge.{name}"
        wording = Wording(key, self.model_shown, f"{key}.model", "/chat/completions", KEPT)
        limits = Limits(settings.concurrency, settings.retries, settings.timeout_s)
        self.client = EndpointClient(wording, self._url, KEY_VARIABLE, limits)
        self.prices = (settings.usd_per_million_input / 1e6, settings.usd_per_million_output / 1e6)
        self.spent = 0.0
        self._reserved = 0.0
        self._limit_key = "max_tokens"
        """Parameter for the output limit; max_completion_tokens once the model has rejected max_tokens."""
        self._temperature = settings.temperature
        """None once the model has rejected a temperature."""
        self._lock = Lock()

    @property
    def reply_settings(self) -> list[Any]:
        """Settings that determine a reply, for the judge's version."""
        url = self._url and self._url.bare
        return [self.settings.model, url, self.settings.temperature, self.settings.max_output_tokens]

    def request_all(self, texts: Sequence[str], read: Callable[[str], T | None]) -> Iterator[T | None]:
        """Yield the result of `read` for the reply to each text, in order.

        Requests run concurrently. After a failure no more start. Requests in progress are paid, so their results are
        still yielded, then the first failure is raised.

        Args:
            texts: the questions.
            read: returns the result in the text of a reply, None if it contains no result.

        Yields:
            A result, or None for a request that failed.

        Raises:
            UserError: if the endpoint rejects a request, the cap is reached, or two replies to a text are unreadable.
        """
        done = 0
        try:
            for result in self.client.request_all(texts, partial(self._request, read=read)):
                done += result is not None
                yield result
        except _CapReached as failure:
            raise UserError(
                f"judge.{self.name}.max_cost_usd={self.settings.max_cost_usd:g}: the next answer could exceed it "
                f"(spent so far: {self.spent:.4f} USD; {done} answers were judged now). Fix: repeat the command with a "
                "higher one; finished verdicts are kept"
            ) from failure

    def _request(self, api: Any, index: int, text: str, read: Callable[[str], T | None]) -> T:
        reply = Completion()
        for _ in range(2):
            # JSON can't contain half a surrogate pair.
            reply = self._paid_reply(api, text.encode(errors="replace").decode())
            verdict = read(reply.text) if reply.problem is None else None
            if verdict is not None:
                return verdict
        raise UserError(self._unreadable_message(index, reply))

    def _paid_reply(self, api: Any, text: str) -> Completion:
        import openai

        cost = self._price(len((self.system + text).encode()) / BYTES_PER_TOKEN, self.settings.max_output_tokens)
        with self._lock:
            if self.spent + self._reserved + cost > self.settings.max_cost_usd:
                raise _CapReached
            self._reserved += cost
        paid = 0.0
        try:
            reply = self._send(api, text)
            paid = cost if reply.tokens is None else self._price(*reply.tokens)
            return reply
        except openai.APIConnectionError:
            # The server may have answered by the timeout or the loss of the connection.
            paid = cost
            raise
        finally:
            # One lock for both changes: between them another request could exceed the cap.
            with self._lock:
                self._reserved -= cost
                self.spent += paid

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return tokens_in * self.prices[0] + tokens_out * self.prices[1]

    def _send(self, api: Any, text: str) -> Completion:
        """Send one request. If the model rejects max_tokens or temperature, retry without it and remember that."""
        import openai

        messages: list[Any] = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": text})
        while True:
            # Other threads may change the attributes during this attempt.
            limit_key, temperature = self._limit_key, self._temperature
            parameters: dict[str, Any] = {limit_key: self.settings.max_output_tokens}
            if temperature is not None:
                parameters["temperature"] = temperature
            try:
                # Streaming avoids that the library parses the body or reads it without a limit.
                with api.chat.completions.with_streaming_response.create(
                    model=self.settings.model, messages=messages, **parameters
                ) as response:
                    return read_completion(response.iter_bytes(), self.settings.timeout_s)
            except openai.BadRequestError as error:
                words = str(error).lower()
                newer = "max_completion_tokens" in words or ("max_tokens" in words and "support" in words)
                if newer and limit_key == "max_tokens":
                    self._limit_key = "max_completion_tokens"
                elif "temperature" in words and temperature is not None:
                    if self._temperature is not None:
                        log.warning(
                            "judge.%s: %s takes no temperature=%s; it is no longer sent",
                            self.name,
                            self.model_shown,
                            temperature,
                        )
                    self._temperature = None
                else:
                    raise

    def _unreadable_message(self, index: int, reply: Completion) -> str:
        key = f"judge.{self.name}"
        if reply.problem is not None:
            return (
                f"{self.client.address}: no chat completion for answer {index + 1} in two replies (problem of the last "
                f"one: {reply.problem}). Fix: set {key}.base_url or {URL_VARIABLE} to the URL before "
                f"/chat/completions. {KEPT}"
            )
        return (
            f"{key}: {self.model_shown} returned no verdict on answer {index + 1} in two replies (the last one has "
            f"{len(reply.text)} characters). Fix: if it refuses to judge, try another model or rubric; if it thinks "
            f"before it answers, raise {key}.max_output_tokens={self.settings.max_output_tokens}. Finished verdicts "
            "are kept"
        )


class _CapReached(RequestRefused):
    """Signal that the next request could exceed the cost cap."""


def _configured_url(name: str, base_url: str | None) -> EndpointURL | None:
    """Return the URL of the config or else of the environment, None if neither is set."""
    key, url = (f"judge.{name}.base_url", base_url) if base_url else (URL_VARIABLE, os.environ.get(URL_VARIABLE, ""))
    return split_url(url.strip(), key) if url.strip() else None
