"""Asking a model behind an OpenAI-compatible endpoint: with retries, under a cap of costs, in order."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, TypeVar

from lisa_lightning.errors import UserError

T = TypeVar("T")
CHARACTERS_PER_TOKEN = 3  # fewer than in English, so that the estimate is on the dear side
KEY = "OPENAI_API_KEY"


class Endpoint:
    """A model, its prices and what was spent; the key comes from the environment and stays in the client.

    Args:
        name: the judge's, for the keys that messages name.
        base_url: of the endpoint; None for the package's own default, or OPENAI_BASE_URL.
        usd_per_million_input, usd_per_million_output: prices of tokens, without which no cap could hold.
        max_cost_usd: what one judging may cost in all.
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
        temperature: float,
    ) -> None:
        if not os.environ.get(KEY):
            raise UserError(f"judge.{name} needs a key: set the environment variable {KEY} (never a key of the config)")
        for key, value in (("max_cost_usd", max_cost_usd), ("concurrency", concurrency), ("timeout_s", timeout_s)):
            if not value > 0:
                raise UserError(f"judge.{name}.{key}={value} is not allowed; it must be above 0")
        self.name, self.model, self.base_url = name, model, base_url
        self.prices = (usd_per_million_input / 1e6, usd_per_million_output / 1e6)
        self.max_cost, self.max_output_tokens = max_cost_usd, max_output_tokens
        self.concurrency, self.retries, self.timeout, self.temperature = concurrency, retries, timeout_s, temperature
        self.spent = 0.0
        self._reserved = 0.0
        self._lock = Lock()
        self._client: Any = None

    def ask_all(self, texts: Sequence[str], read: Callable[[str], T | None]) -> Iterator[T]:
        """What `read` makes of the reply to each text, in order.

        A few are asked at once. Where one fails, those before it are yielded first, and those under way are waited for.

        Raises:
            UserError: the endpoint refuses, the cap is reached, or a reply can't be read even when asked anew.
        """
        import openai

        own = openai.OpenAI(base_url=self.base_url, max_retries=self.retries, timeout=self.timeout)
        with own as self._client, ThreadPoolExecutor(self.concurrency) as pool:
            waiting: list[Future[T]] = []
            done = 0
            for index, text in enumerate(texts):
                waiting.append(pool.submit(self._ask, index, text, read))
                if len(waiting) >= self.concurrency:
                    yield self._result(waiting, done)
                    done += 1
            while waiting:
                yield self._result(waiting, done)
                done += 1

    def _result(self, waiting: list[Future[T]], done: int) -> T:
        try:
            return waiting.pop(0).result()
        except _Capped as error:
            for later in waiting:
                later.cancel()
            raise UserError(
                f"judge.{self.name}.max_cost_usd={self.max_cost}: the next answer could pass it (spent so far: "
                f"{self.spent:.4f} USD; {done} answers were judged now). The same command with a higher one goes on "
                "where it stopped"
            ) from error
        except BaseException:
            for later in waiting:
                later.cancel()
            raise

    def _ask(self, index: int, text: str, read: Callable[[str], T | None]) -> T:
        reply = ""
        for _ in range(2):
            reply = self._reply(text)
            found = read(reply)
            if found is not None:
                return found
        raise UserError(
            f"judge.{self.name}: {self.model} gave no verdict on answer {index + 1}, asked twice (a reply of "
            f"{len(reply)} characters). It may refuse to judge; try another model or rubric. What was judged is kept"
        )

    def _reply(self, text: str) -> str:
        import openai

        cost = len(text) / CHARACTERS_PER_TOKEN * self.prices[0] + self.max_output_tokens * self.prices[1]
        with self._lock:
            if self.spent + self._reserved + cost > self.max_cost:
                raise _Capped
            self._reserved += cost
        try:
            reply = self._client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": text}],
                temperature=self.temperature,
                max_tokens=self.max_output_tokens,
            )
        except openai.OpenAIError as error:
            raise UserError(self._explained(error)) from None  # the cause may carry the request with its key
        finally:
            with self._lock:
                self._reserved -= cost
        usage = reply.usage
        with self._lock:
            self.spent += (
                cost
                if usage is None
                else usage.prompt_tokens * self.prices[0] + usage.completion_tokens * self.prices[1]
            )
        return (reply.choices[0].message.content if reply.choices else None) or ""

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
        words = str(error).splitlines()[0][:200].replace(os.environ.get(KEY, "\0"), "***")
        place = self.base_url or os.environ.get("OPENAI_BASE_URL") or "the default endpoint"
        return f"judge.{self.name} at {place}: {known.get(status or 0, what)} ({words}). What was judged is kept"


class _Capped(Exception):
    """The next request could cost more than is allowed."""
