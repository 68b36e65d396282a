"""Requests to an OpenAI-compatible server: concurrency in order, retries, key and redirects. Start at `EndpointClient`.

What a request contains and costs is its caller's: a judge's or that of a generation engine.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from lisa_lightning.runtime.endpoint_url import EndpointURL, masked, same_server, without_secrets
from lisa_lightning.runtime.errors import UserError, first_line, printable

Item = TypeVar("Item")
T = TypeVar("T")
OPENAI_URL: Final = "https://api.openai.com/v1"
LOGGERS: Final = ("httpx", "httpx2", "httpcore", "httpcore2", "openai")
"""Names of loggers that log URLs, headers or bodies of requests."""
NO_KEY: Final = "none"
"""Text that a server without a key receives in its place, since the library requires one."""


class RequestRefused(Exception):
    """Signal of a caller that its request must not be sent; it passes through unchanged."""


class _RedirectRefused(BaseException):
    """Signal that a redirect is refused.

    It is a BaseException because some versions of openai wrap every Exception and send the request again.
    """


@dataclass(frozen=True, slots=True)
class Wording:
    """Names that the error messages of a client contain."""

    section: str
    """Section of the config, such as `judge.openai`."""
    model: str
    """Name of the model, safe to print."""
    model_key: str
    """Config key of the model."""
    path: str
    """End of the URL of a request, such as `/chat/completions`."""
    kept: str
    """Sentence about finished results, without a full stop."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of the requests of a client."""

    concurrency: int
    """Number of simultaneous requests."""
    retries: int
    """Retries of a request that fails temporarily."""
    timeout_s: float
    """Timeout of a request in seconds."""


class EndpointClient:
    """Client of an OpenAI-compatible server.

    The API key is read from the environment and stored in the client of the library alone.

    Args:
        wording: names in error messages.
        url: URL of the server; None is OpenAI's.
        key_variable: environment variable of the API key; None sends no key.
        limits: limits of the requests.
        is_child: True for a server that this process has started. No proxy is used for it.

    Raises:
        UserError: if the key is missing, or no HTTP header can contain it.
    """

    def __init__(
        self,
        wording: Wording,
        url: EndpointURL | None,
        key_variable: str | None,
        limits: Limits,
        is_child: bool = False,
    ) -> None:
        self.wording, self.limits, self._is_child = wording, limits, is_child
        self._url, self._key_variable = url, key_variable
        read_api_key(wording.section, key_variable)
        self._api: Any = None
        self._redirect_error: UserError | None = None
        """Error of a refused redirect. No request is sent after it."""

    @property
    def address(self) -> str:
        """Section and URL without secrets, for messages."""
        return f"{self.wording.section} at {printable(self._url.bare) if self._url else 'the default endpoint'}"

    @contextmanager
    def connect(self) -> Iterator[Any]:
        """Yield a client of openai that logs no request and follows no redirect to another server."""
        import openai

        _silence_loggers()
        auth, query, bare = (self._url.auth, self._url.query, self._url.bare) if self._url else (None, (), OPENAI_URL)
        try:
            # Its HTTP library depends on the version of openai.
            http = openai.DefaultHttpxClient(
                auth=auth,
                params=query,
                event_hooks={"request": [self._refuse_redirect]},
                trust_env=not self._is_child,
            )
            api = openai.OpenAI(
                api_key=read_api_key(self.wording.section, self._key_variable),
                base_url=bare,
                max_retries=self.limits.retries,
                timeout=self.limits.timeout_s,
                http_client=http,
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(self.explain(error)) from None
        with api as self._api:
            yield self._api

    def request_all(self, items: Sequence[Item], request: Callable[[Any, int, Item], T]) -> Iterator[T | None]:
        """Yield the result of a request for each item, in order.

        Requests run concurrently. After a failure no more start. Requests in progress may be paid, so their results
        are still yielded, then the first failure is raised.

        Args:
            items: contents of the requests.
            request: sends a request and returns its result; its arguments are the client of openai, the index of the
                item and the item. It is called in threads.

        Yields:
            A result, or None for a request that failed.

        Raises:
            UserError: if the server rejects a request or can't be reached, or `request` raises it.
            RequestRefused: if `request` raises it.
        """
        remaining = enumerate(items)
        running: list[Future[T]] = []
        failure: Exception | None = None
        concurrency = self.limits.concurrency
        with self.connect() as api, _threads(concurrency) as pool:
            while True:
                while len(running) < concurrency and failure is None and not any(map(_failed, running)):
                    if (numbered := next(remaining, None)) is None:
                        break
                    try:
                        running.append(pool.submit(self.call, request, api, *numbered))
                    except RuntimeError:  # The system has no more threads.
                        failure = UserError(
                            f"{self.wording.section}.concurrency={concurrency}: the system starts no more threads. "
                            f"Fix: set a smaller one. {self.wording.kept}"
                        )
                if not running:
                    break
                try:
                    result = running.pop(0).result()
                except Exception as error:
                    result, failure = None, failure or error
                yield result
        if failure is not None:
            raise failure

    def call(self, request: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a request, with errors of the library as sentences.

        Args:
            request: sends a request.
            *arguments: its arguments.

        Raises:
            UserError: if the server rejects the request or can't be reached.
        """
        try:
            return request(*arguments)
        except (UserError, RequestRefused):
            raise
        except _RedirectRefused:
            assert self._redirect_error is not None
            raise self._redirect_error from None
        except Exception as error:
            # The cause may contain the request with its key.
            raise UserError(self.explain(error)) from None

    def explain(self, error: BaseException) -> str:
        """Return an error of the library as a sentence with a fix, without secrets."""
        section, model = self.wording.section, self.wording.model
        status: int | None = getattr(error, "status_code", None)
        problem = "the request failed" if status is None else f"the request failed with status {status}"
        problems = {
            400: ("it refuses the request", f"check {self.wording.model_key} and its other keys"),
            401: (f"it doesn't accept {self._key_words}", self._key_fix),
            403: (f"{self._key_words} has no access to this model", "use another key or model"),
            404: (f"it knows no model {model}", f"correct {self.wording.model_key} or {section}.base_url"),
            429: (
                "it limits the request rate, or the account has no credit",
                f"lower {section}.concurrency or add credit",
            ),
        }
        problem, fix = problems.get(status or 0, (problem, f"check {section}.base_url, or repeat the command later"))
        causes = [first_line(cause)[:5000] for cause in (error, error.__cause__) if cause is not None]
        # The cause of some errors has the same text.
        text = self.masked(" ".join(dict.fromkeys(causes)))[:200]
        return f"{self.address}: {problem} ({text}). Fix: {fix}. {self.wording.kept}"

    def masked(self, text: str) -> str:
        """Return a text on one line, without pieces of the key and of secrets in the URL."""
        key = os.environ.get(self._key_variable or "", "").strip()
        return masked(printable(text), [*filter(None, [key]), *(self._url.secrets if self._url else ())])

    @property
    def _key_words(self) -> str:
        return f"the key in {self._key_variable}" if self._key_variable else "requests without a key"

    @property
    def _key_fix(self) -> str:
        if self._key_variable is None:
            return f"set {self.wording.section}.api_key_variable to the name of the variable with the key"
        return f"set {self._key_variable} to a valid key"

    def _refuse_redirect(self, request: Any) -> None:
        """Raise `_RedirectRefused` for a request to another server, and for every later request."""
        if self._redirect_error is None and not same_server(self._api.base_url, request.url):
            target = self.masked(without_secrets(request.url))[:300]
            self._redirect_error = UserError(
                f"{self.address}: it redirects to {target}, and no question is sent to another server. Fix: set "
                f"{self.wording.section}.base_url to {target.removesuffix(self.wording.path)} if you trust it. "
                f"{self.wording.kept}"
            )
        if self._redirect_error is not None:
            raise _RedirectRefused


def read_api_key(section: str, variable: str | None) -> str:
    """Return the stripped key, or a placeholder if no variable is configured.

    Args:
        section: section of the config, for errors.
        variable: environment variable of the key; None without a key.

    Raises:
        UserError: if the variable is not set, or no HTTP header can contain its value.
    """
    if variable is None:
        return NO_KEY
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"{section}: the environment variable {variable} is not set. Fix: set it to your key, and write "
            "the key into no config"
        )
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"{variable}: it contains a blank, a control character or a character beyond ASCII, which no HTTP "
            f"header can contain (the value is not shown). Fix: set {variable} to the key alone"
        )
    return key


def _failed(request: Future[Any]) -> bool:
    return request.done() and request.exception() is not None


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
