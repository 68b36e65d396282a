"""Asking a model behind an OpenAI-compatible endpoint: with retries, under a cap of costs, in order."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from lisa_lightning.errors import UserError, first_line

log = logging.getLogger(__name__)
T = TypeVar("T")
BYTES_PER_TOKEN = 3  # of UTF-8; fewer than in English, so that the estimate is on the dear side in any script
KEY = "OPENAI_API_KEY"


class Endpoint:
    """A model, its prices and what was spent; the key comes from the environment and stays in the client.

    Args:
        name: the judge's, for the keys that messages name.
        base_url: of the endpoint; None for OPENAI_BASE_URL, or the package's own default.
        usd_per_million_input, usd_per_million_output: prices of tokens, without which no cap could hold.
        max_cost_usd: what one judging may cost in all.
        temperature: None where it should not be sent.
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
        if not os.environ.get(KEY):
            raise UserError(f"judge.{name} needs a key: set the environment variable {KEY} (never a key of the config)")
        self.name, self.model, self.base_url = name, model, base_url or os.environ.get("OPENAI_BASE_URL")
        self.prices = (usd_per_million_input / 1e6, usd_per_million_output / 1e6)
        self.max_cost, self.max_output_tokens = max_cost_usd, max_output_tokens
        self.concurrency, self.retries, self.timeout, self.temperature = concurrency, retries, timeout_s, temperature
        self.spent = 0.0
        self._reserved = 0.0
        self._limit_key = "max_tokens"  # and max_completion_tokens once the model has said so
        self._temperature = temperature  # None once the model has said that it takes none
        self._lock = Lock()
        self._client: Any = None

    @property
    def _address(self) -> str | None:
        """Without a password that it may hold, which may change and is not to be shown."""
        return self.base_url and re.split("[?#]", re.sub(r"//\S*@", "//", self.base_url))[0]

    @property
    def _at(self) -> str:
        return f"judge.{self.name} at {self._address or 'the default endpoint'}"

    @property
    def asked(self) -> list[Any]:
        """What a reply depends on beside the text: a part of the judge's version."""
        return [self.model, self._address, self.temperature, self.max_output_tokens]

    def ask_all(self, texts: Sequence[str], read: Callable[[str], T | None]) -> Iterator[T | None]:
        """What `read` makes of the reply to each text, in order.

        A few are asked at once. After one fails no more are asked, but those under way are paid: what comes of them is
        yielded, None in the places of those that failed, and then the first failure ends it.

        Raises:
            UserError: the endpoint refuses, the cap is reached, or a reply can't be read even when asked anew.
        """
        import openai

        own = openai.OpenAI(base_url=self.base_url, max_retries=self.retries, timeout=self.timeout)
        coming = enumerate(texts)
        waiting: list[Future[T]] = []
        failure: Exception | None = None
        done = 0
        with own as self._client, ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                while len(waiting) < self.concurrency and failure is None and not any(map(_failed, waiting)):
                    if (following := next(coming, None)) is None:
                        break
                    waiting.append(pool.submit(self._ask, *following, read))
                if not waiting:
                    break
                try:
                    found = waiting.pop(0).result()
                except Exception as error:
                    found, failure = None, failure or error
                done += found is not None
                yield found
        if isinstance(failure, _Capped):
            raise UserError(
                f"judge.{self.name}.max_cost_usd={self.max_cost}: the next answer could pass it (spent so far: "
                f"{self.spent:.4f} USD; {done} answers were judged now). The same command with a higher one goes on "
                "where it stopped"
            ) from failure
        if failure is not None:
            raise failure

    def _ask(self, index: int, text: str, read: Callable[[str], T | None]) -> T:
        reply = ""
        for _ in range(2):
            reply = self._reply(text)
            found = read(reply)
            if found is not None:
                return found
        raise UserError(
            f"judge.{self.name}: {self.model} gave no verdict on answer {index + 1}, asked twice (a reply of "
            f"{len(reply)} characters). It may refuse to judge, so try another model or rubric, or think before it "
            f"answers, which judge.{self.name}.max_output_tokens={self.max_output_tokens} is too small for. What was "
            "judged is kept"
        )

    def _reply(self, text: str) -> str:
        import openai

        cost = self._price(len(text.encode()) / BYTES_PER_TOKEN, self.max_output_tokens)
        with self._lock:
            if self.spent + self._reserved + cost > self.max_cost:
                raise _Capped
            self._reserved += cost
        paid = 0.0
        try:
            reply = self._create(text)
            if not hasattr(reply, "choices"):  # a page of a server that isn't such an endpoint comes as text
                raise UserError(f"{self._at}: what answers is no such endpoint. What was judged is kept")
            used = reply.usage
            paid = cost if used is None else self._price(used.prompt_tokens, used.completion_tokens)
        except openai.OpenAIError as error:
            raise UserError(self._explained(error)) from None  # the cause may carry the request with its key
        finally:
            with self._lock:  # both at once: in between another request could pass the cap
                self._reserved -= cost
                self.spent += paid
        return (reply.choices[0].message.content if reply.choices else None) or ""

    def _price(self, tokens_in: float, tokens_out: float) -> float:
        return tokens_in * self.prices[0] + tokens_out * self.prices[1]

    def _create(self, text: str) -> Any:
        """One request, put anew where the model wants its parameters otherwise; that is remembered."""
        import openai

        while True:
            limit_key, temperature = self._limit_key, self._temperature  # of this try: other threads learn too
            asked: dict[str, Any] = {limit_key: self.max_output_tokens}
            if temperature is not None:
                asked["temperature"] = temperature
            try:
                return self._client.chat.completions.create(
                    model=self.model, messages=[{"role": "user", "content": text}], **asked
                )
            except openai.BadRequestError as error:
                words = str(error).lower()
                newer = "max_completion_tokens" in words or ("max_tokens" in words and "support" in words)
                if newer and limit_key == "max_tokens":
                    self._limit_key = "max_completion_tokens"
                elif "temperature" in words and temperature is not None:
                    if self._temperature is not None:
                        log.warning(
                            "judge.%s: %s takes no temperature=%s; asked without", self.name, self.model, temperature
                        )
                    self._temperature = None
                else:
                    raise

    def _explained(self, error: Any) -> str:
        status: int | None = getattr(error, "status_code", None)
        what = "it can't be asked" if status is None else f"it fails with status {status}"
        known = {
            400: f"it refuses the request; look at judge.{self.name}.model and its other keys",
            401: f"it doesn't accept the key in {KEY}",
            403: f"it doesn't let the key in {KEY} use this model",
            404: f"it knows no model {self.model}; look at judge.{self.name}.model and base_url",
            429: "it is asked too often, or the account is used up",
        }
        words = first_line(error).replace(os.environ.get(KEY, "\0"), "***")[:200]
        return f"{self._at}: {known.get(status or 0, what)} ({words}). What was judged is kept"


class _Capped(Exception):
    """The next request could cost more than is allowed."""


def _failed(asking: Future[Any]) -> bool:
    return asking.done() and asking.exception() is not None
