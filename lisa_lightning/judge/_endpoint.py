"""Ask a model at an OpenAI-compatible endpoint: with retries, under a cap of costs, in order."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypeVar

from lisa_lightning.judge._endpoint_reply import Completion, read_completion
from lisa_lightning.judge._endpoint_url import EndpointURL, masked, same_server, split_url, without_secrets
from lisa_lightning.runtime.errors import UserError, first_line, printable

log = logging.getLogger(__name__)
T = TypeVar("T")
BYTES_PER_TOKEN = 3  # of UTF-8; fewer than in English, so that the estimate is on the dear side in any script
KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
OPENAI_URL = "https://api.openai.com/v1"
LOGGERS = ("httpx", "httpx2", "httpcore", "httpcore2", "openai")
"""Libraries that log URLs, headers or bodies of requests."""


class Endpoint:
    """A model, its prices and what was spent; the key comes from the environment and stays in the client.

    Args:
        name: the judge's, for the keys that messages name.
        base_url: of the endpoint; None for OPENAI_BASE_URL, or OpenAI's own. User and password become HTTP basic
            authentication in place of the key, and a query goes with each request; neither is shown.
        usd_per_million_input, usd_per_million_output: prices of tokens, without which no cap could hold.
        max_cost_usd: what one judging may cost in all.
        temperature: None where it should not be sent.

    Raises:
        UserError: there is no key, no HTTP header can hold it, or the URL is not valid.
    """

    def __init__(
        self,
        name: str,
        model: str,
        base_url: str | None,
        usd_per_million_input: float,
        usd_per_million_output: float,
        max_cost_usd: float,
        max_output_tokens: int,
        concurrency: int,
        retries: int,
        timeout_s: float,
        temperature: float | None,
    ) -> None:
        _key(name)
        self.name, self.model, self.model_shown = name, model, printable(model)[:100]
        self._url = _url(name, base_url)
        self.prices = (usd_per_million_input / 1e6, usd_per_million_output / 1e6)
        self.max_cost, self.max_output_tokens = max_cost_usd, max_output_tokens
        self.concurrency, self.retries, self.timeout, self.temperature = concurrency, retries, timeout_s, temperature
        self.spent = 0.0
        self._reserved = 0.0
        self._limit_key = "max_tokens"  # and max_completion_tokens once the model has said so
        self._temperature = temperature  # None once the model has said that it takes none
        self._lock = Lock()
        self._client: Any = None
        self._refusal: UserError | None = None  # of a redirect; no request is sent after it

    @property
    def _at(self) -> str:
        return f"judge.{self.name} at {printable(self._url.bare) if self._url else 'the default endpoint'}"

    @property
    def reply_settings(self) -> list[Any]:
        """Return what a reply depends on apart from the text: a part of the judge's version."""
        return [self.model, self._url and self._url.bare, self.temperature, self.max_output_tokens]

    def ask_all(self, texts: Sequence[str], read: Callable[[str], T | None]) -> Iterator[T | None]:
        """Yield what `read` makes of the reply to each text, in order.

        A few requests run at once. After one fails no more start, but those under way are paid: their results are
        yielded, None for each that failed, and then the first failure is raised.

        Args:
            texts: the questions.
            read: turns the text of a reply into a result, None where it holds none.

        Raises:
            UserError: the endpoint refuses, the cap is reached, or two replies to one text can't be read.
        """
        client = self._open()
        coming = enumerate(texts)
        waiting: list[Future[T]] = []
        failure: Exception | None = None
        done = 0
        with client as self._client, _threads(self.concurrency) as pool:
            while True:
                while len(waiting) < self.concurrency and failure is None and not any(map(_failed, waiting)):
                    if (following := next(coming, None)) is None:
                        break
                    try:
                        waiting.append(pool.submit(self._ask, *following, read))
                    except RuntimeError:  # there are no more threads
                        failure = UserError(
                            f"judge.{self.name}.concurrency={self.concurrency}: the system starts no more threads. "
                            "Fix: set a smaller one. What was judged is kept"
                        )
                if not waiting:
                    break
                try:
                    result = waiting.pop(0).result()
                except Exception as error:
                    result, failure = None, failure or error
                done += result is not None
                yield result
        if isinstance(failure, _Capped):
            raise UserError(
                f"judge.{self.name}.max_cost_usd={self.max_cost}: the next answer could pass it (spent so far: "
                f"{self.spent:.4f} USD; {done} answers were judged now). The same command with a higher one goes on "
                "where it stopped"
            ) from failure
        if failure is not None:
            raise failure

    def _open(self) -> Any:
        """Return a client that logs no request and follows no redirect to another server."""
        import openai

        _silence_loggers()
        auth, query = (self._url.auth, self._url.query) if self._url else (None, ())
        try:
            # The library's own class: which HTTP library has it depends on the version of openai.
            http = openai.DefaultHttpxClient(auth=auth, params=query, event_hooks={"request": [self._refuse_redirect]})
            return openai.OpenAI(
                api_key=_key(self.name),
                base_url=self._url.bare if self._url else OPENAI_URL,
                max_retries=self.retries,
                timeout=self.timeout,
                http_client=http,
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._explained(error)) from None

    def _refuse_redirect(self, request: Any) -> None:
        """Raise `_Refused` before a redirect would send a request to another server, and before any later request."""
        if self._refusal is None and not same_server(self._client.base_url, request.url):
            target = masked(printable(without_secrets(request.url)), self._secrets())[:300]
            self._refusal = UserError(
                f"{self._at}: it redirects to {target}, and no question is sent to another server. Fix: set "
                f"judge.{self.name}.base_url to {target.removesuffix('/chat/completions')} if you trust it. What was "
                "judged is kept"
            )
        if self._refusal is not None:
            raise _Refused

    def _ask(self, index: int, text: str, read: Callable[[str], T | None]) -> T:
        reply = Completion()
        try:
            for _ in range(2):
                reply = self._reply(text.encode(errors="replace").decode())  # JSON can't hold half a surrogate pair
                verdict = read(reply.text) if reply.problem is None else None
                if verdict is not None:
                    return verdict
        except (UserError, _Capped):
            raise
        except Exception as error:
            raise UserError(self._explained(error)) from None  # the cause may carry the request with its key
        raise UserError(self._unread(index, reply))

    def _reply(self, text: str) -> Completion:
        import openai

        cost = self._price(len(text.encode()) / BYTES_PER_TOKEN, self.max_output_tokens)
        with self._lock:
            if self.spent + self._reserved + cost > self.max_cost:
                raise _Capped
            self._reserved += cost
        paid = 0.0
        try:
            reply = self._create(text)
            paid = cost if reply.tokens is None else self._price(*reply.tokens)
            return reply
        except _Refused:
            # The redirecting server gave no answer, so nothing is paid.
            assert self._refusal is not None
            raise self._refusal from None
        except openai.APIConnectionError:
            paid = cost  # the server may have answered when the time was over or the connection broke
            raise
        finally:
            with self._lock:  # both at once: in between another request could pass the cap
                self._reserved -= cost
                self.spent += paid

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return tokens_in * self.prices[0] + tokens_out * self.prices[1]

    def _create(self, text: str) -> Completion:
        """Send one request, and send it again where the model wants other parameters; these are remembered."""
        import openai

        while True:
            limit_key, temperature = self._limit_key, self._temperature  # of this try: other threads learn too
            parameters: dict[str, Any] = {limit_key: self.max_output_tokens}
            if temperature is not None:
                parameters["temperature"] = temperature
            try:
                # Streamed, so that the body is neither parsed by the library nor read beyond all bounds.
                with self._client.chat.completions.with_streaming_response.create(
                    model=self.model, messages=[{"role": "user", "content": text}], **parameters
                ) as response:
                    return read_completion(response.iter_bytes(), self.timeout)
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

    def _explained(self, error: BaseException) -> str:
        status: int | None = getattr(error, "status_code", None)
        what = "it can't be asked" if status is None else f"it fails with status {status}"
        known = {
            400: f"it refuses the request; look at judge.{self.name}.model and its other keys",
            401: f"it doesn't accept the key in {KEY}",
            403: f"it doesn't let the key in {KEY} use this model",
            404: f"it knows no model {self.model_shown}; look at judge.{self.name}.model and base_url",
            429: "it is asked too often, or the account is used up",
        }
        causes = [first_line(cause)[:5000] for cause in (error, error.__cause__) if cause is not None]
        words = " ".join(dict.fromkeys(causes))  # of some errors the cause has the same text
        words = masked(printable(words), self._secrets())[:200]
        return f"{self._at}: {known.get(status or 0, what)} ({words}). What was judged is kept"

    def _unread(self, index: int, reply: Completion) -> str:
        if reply.problem is not None:
            return (
                f"{self._at}: it sent no chat completion for answer {index + 1}, asked twice; what answers is no such "
                f"endpoint, or fails (the last reply: {reply.problem}). Fix: set judge.{self.name}.base_url or {URL} "
                "to the URL before /chat/completions. What was judged is kept"
            )
        return (
            f"judge.{self.name}: {self.model_shown} gave no verdict on answer {index + 1}, asked twice (a reply of "
            f"{len(reply.text)} characters). It may refuse to judge, so try another model or rubric, or think before "
            f"it answers, which judge.{self.name}.max_output_tokens={self.max_output_tokens} is too small for. What "
            "was judged is kept"
        )

    def _secrets(self) -> list[str]:
        key = os.environ.get(KEY, "").strip()
        return [*filter(None, [key]), *(self._url.secrets if self._url else ())]


class _Capped(Exception):
    """The next request could cost more than is allowed."""


class _Refused(BaseException):
    """A redirect is refused. Some versions of openai wrap every Exception and send the request again."""


def _failed(asking: Future[Any]) -> bool:
    return asking.done() and asking.exception() is not None


def _key(name: str) -> str:
    """Return the key without white space around it; raise UserError where none is set or no header can hold it."""
    key = os.environ.get(KEY, "").strip()
    if not key:
        raise UserError(f"judge.{name} needs a key: set the environment variable {KEY} (never a key of the config)")
    if not re.fullmatch("[!-~]+", key):
        raise UserError(
            f"{KEY}: it holds a blank, a control character or one beyond ASCII, which no HTTP header can hold (it is "
            f"not shown). Fix: set {KEY} to the key alone, as its provider shows it"
        )
    return key


def _url(name: str, base_url: str | None) -> EndpointURL | None:
    """Return the URL of the config or else of the environment, None where neither is set."""
    key, url = (f"judge.{name}.base_url", base_url) if base_url else (URL, os.environ.get(URL, ""))
    return split_url(url.strip(), key) if url.strip() else None


def _silence_loggers() -> None:
    """Raise the level of all loggers that could show a URL or a header, whatever the environment or Hydra set."""
    for name in {*LOGGERS, *logging.root.manager.loggerDict}:
        if name.partition(".")[0] in LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(max(logger.level, logging.WARNING))


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads for requests; an interrupt does not wait for those under way, which may take minutes."""
    pool = ThreadPoolExecutor(count)
    wait = True
    try:
        yield pool
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=not wait)
