"""Requests to an OpenAI-compatible endpoint, with retries and a cost cap. Start at `Endpoint.request_all`."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Annotated, Any, Final, TypeVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Count, Name, NonNegative, Positive, PublicUrl, Words
from lisa_lightning.judge._endpoint_reply import Completion, read_completion
from lisa_lightning.judge._endpoint_url import EndpointURL, masked, same_server, split_url, without_secrets
from lisa_lightning.runtime.errors import UserError, first_line, printable

log = logging.getLogger(__name__)
T = TypeVar("T")
BYTES_PER_TOKEN = 3
"""UTF-8 bytes per token in cost estimates. English has more, so that the estimate is an upper bound in any script."""
KEY_VARIABLE, URL_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
LOGGERS = ("httpx", "httpx2", "httpcore", "httpcore2", "openai")
"""Names of loggers that log URLs, headers or bodies of requests."""
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
    concurrency: Annotated[int, Field(gt=0, le=1024)]
    """Number of simultaneous requests."""
    retries: Annotated[int, Field(ge=0, le=100)]
    """Retries of a request that fails temporarily."""
    timeout_s: Annotated[float, Field(gt=0, le=86400)]
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
        _api_key(name)
        self.system = system
        self.name, self.settings, self.model_shown = name, settings, printable(settings.model)[:100]
        self._url = _configured_url(name, settings.base_url)
        self.prices = (settings.usd_per_million_input / 1e6, settings.usd_per_million_output / 1e6)
        self.spent = 0.0
        self._reserved = 0.0
        self._limit_key = "max_tokens"
        """Parameter for the output limit; max_completion_tokens once the model has rejected max_tokens."""
        self._temperature = settings.temperature
        """None once the model has rejected a temperature."""
        self._lock = Lock()
        self._client: Any = None
        self._redirect_error: UserError | None = None
        """Error of a refused redirect. No request is sent after it."""

    @property
    def _address(self) -> str:
        return f"judge.{self.name} at {printable(self._url.bare) if self._url else 'the default endpoint'}"

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
        client = self._open_client()
        remaining = enumerate(texts)
        running: list[Future[T]] = []
        failure: Exception | None = None
        done = 0
        with client as self._client, _threads(self.settings.concurrency) as pool:
            while True:
                while len(running) < self.settings.concurrency and failure is None and not any(map(_failed, running)):
                    if (question := next(remaining, None)) is None:
                        break
                    try:
                        running.append(pool.submit(self._request, *question, read))
                    except RuntimeError:  # The system has no more threads.
                        failure = UserError(
                            f"judge.{self.name}.concurrency={self.settings.concurrency}: the system starts no more "
                            "threads. Fix: set a smaller one. Finished verdicts are kept"
                        )
                if not running:
                    break
                try:
                    result = running.pop(0).result()
                except Exception as error:
                    result, failure = None, failure or error
                done += result is not None
                yield result
        if isinstance(failure, _CapReached):
            raise UserError(
                f"judge.{self.name}.max_cost_usd={self.settings.max_cost_usd:g}: the next answer could exceed it "
                f"(spent so far: {self.spent:.4f} USD; {done} answers were judged now). Fix: repeat the command with a "
                "higher one; finished verdicts are kept"
            ) from failure
        if failure is not None:
            raise failure

    def _open_client(self) -> Any:
        """Return a client that logs no request and follows no redirect to another server."""
        import openai

        _silence_loggers()
        auth, query = (self._url.auth, self._url.query) if self._url else (None, ())
        try:
            # Its HTTP library depends on the version of openai.
            http = openai.DefaultHttpxClient(auth=auth, params=query, event_hooks={"request": [self._refuse_redirect]})
            return openai.OpenAI(
                api_key=_api_key(self.name),
                base_url=self._url.bare if self._url else OPENAI_URL,
                max_retries=self.settings.retries,
                timeout=self.settings.timeout_s,
                http_client=http,
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._error_message(error)) from None

    def _refuse_redirect(self, request: Any) -> None:
        """Raise `_RedirectRefused` for a request to another server, and for every later request."""
        if self._redirect_error is None and not same_server(self._client.base_url, request.url):
            target = masked(printable(without_secrets(request.url)), self._secrets())[:300]
            self._redirect_error = UserError(
                f"{self._address}: it redirects to {target}, and no question is sent to another server. Fix: set "
                f"judge.{self.name}.base_url to {target.removesuffix('/chat/completions')} if you trust it. Finished "
                "verdicts are kept"
            )
        if self._redirect_error is not None:
            raise _RedirectRefused

    def _request(self, index: int, text: str, read: Callable[[str], T | None]) -> T:
        reply = Completion()
        try:
            for _ in range(2):
                # JSON can't contain half a surrogate pair.
                reply = self._paid_reply(text.encode(errors="replace").decode())
                verdict = read(reply.text) if reply.problem is None else None
                if verdict is not None:
                    return verdict
        except (UserError, _CapReached):
            raise
        except Exception as error:
            # The cause may contain the request with its key.
            raise UserError(self._error_message(error)) from None
        raise UserError(self._unreadable_message(index, reply))

    def _paid_reply(self, text: str) -> Completion:
        import openai

        cost = self._price(len((self.system + text).encode()) / BYTES_PER_TOKEN, self.settings.max_output_tokens)
        with self._lock:
            if self.spent + self._reserved + cost > self.settings.max_cost_usd:
                raise _CapReached
            self._reserved += cost
        paid = 0.0
        try:
            reply = self._send(text)
            paid = cost if reply.tokens is None else self._price(*reply.tokens)
            return reply
        except _RedirectRefused:
            # The redirecting server computed no answer, so nothing is paid.
            assert self._redirect_error is not None
            raise self._redirect_error from None
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

    def _send(self, text: str) -> Completion:
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
                with self._client.chat.completions.with_streaming_response.create(
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

    def _error_message(self, error: BaseException) -> str:
        key = f"judge.{self.name}"
        status: int | None = getattr(error, "status_code", None)
        problem = "the request failed" if status is None else f"the request failed with status {status}"
        problems = {
            400: ("it refuses the request", f"check {key}.model and its other keys"),
            401: (f"it doesn't accept the key in {KEY_VARIABLE}", f"set {KEY_VARIABLE} to a valid key"),
            403: (f"the key in {KEY_VARIABLE} has no access to this model", "use another key or model"),
            404: (f"it knows no model {self.model_shown}", f"correct {key}.model or {key}.base_url"),
            429: ("it limits the request rate, or the account has no credit", f"lower {key}.concurrency or add credit"),
        }
        problem, fix = problems.get(status or 0, (problem, f"check {key}.base_url, or repeat the command later"))
        causes = [first_line(cause)[:5000] for cause in (error, error.__cause__) if cause is not None]
        # The cause of some errors has the same text.
        text = masked(printable(" ".join(dict.fromkeys(causes))), self._secrets())[:200]
        return f"{self._address}: {problem} ({text}). Fix: {fix}. Finished verdicts are kept"

    def _unreadable_message(self, index: int, reply: Completion) -> str:
        key = f"judge.{self.name}"
        if reply.problem is not None:
            return (
                f"{self._address}: no chat completion for answer {index + 1} in two replies (problem of the last one: "
                f"{reply.problem}). Fix: set {key}.base_url or {URL_VARIABLE} to the URL before /chat/completions. "
                "Finished verdicts are kept"
            )
        return (
            f"{key}: {self.model_shown} returned no verdict on answer {index + 1} in two replies (the last one has "
            f"{len(reply.text)} characters). Fix: if it refuses to judge, try another model or rubric; if it thinks "
            f"before it answers, raise {key}.max_output_tokens={self.settings.max_output_tokens}. Finished verdicts "
            "are kept"
        )

    def _secrets(self) -> list[str]:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return [*filter(None, [key]), *(self._url.secrets if self._url else ())]


class _CapReached(Exception):
    """Signal that the next request could exceed the cost cap."""


class _RedirectRefused(BaseException):
    """Signal that a redirect is refused.

    It is a BaseException because some versions of openai wrap every Exception and send the request again.
    """


def _failed(request: Future[Any]) -> bool:
    return request.done() and request.exception() is not None


def _api_key(name: str) -> str:
    """Return the stripped key. Raises UserError if it is not set or no HTTP header can contain it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise UserError(
            f"judge.{name}: the environment variable {KEY_VARIABLE} is not set. Fix: set it to your key, and write "
            "the key into no config"
        )
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"{KEY_VARIABLE}: it contains a blank, a control character or a character beyond ASCII, which no HTTP "
            f"header can contain (the value is not shown). Fix: set {KEY_VARIABLE} to the key alone"
        )
    return key


def _configured_url(name: str, base_url: str | None) -> EndpointURL | None:
    """Return the URL of the config or else of the environment, None if neither is set."""
    key, url = (f"judge.{name}.base_url", base_url) if base_url else (URL_VARIABLE, os.environ.get(URL_VARIABLE, ""))
    return split_url(url.strip(), key) if url.strip() else None


def _silence_loggers() -> None:
    """Set a level of at least WARNING for loggers that could show a URL or header, whatever the environment sets."""
    for name in {*LOGGERS, *logging.root.manager.loggerDict}:
        if name.partition(".")[0] in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(max(logger.level, logging.WARNING))


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads. An interrupt does not wait for requests in progress, which may take minutes."""
    pool = ThreadPoolExecutor(count)
    wait = True
    try:
        yield pool
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=not wait)
