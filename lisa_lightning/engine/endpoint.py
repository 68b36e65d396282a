"""Engine that asks an OpenAI-compatible server, such as vLLM: `EndpointEngine`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, final

import torch
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Concurrency, Name, Phrase, Retries, Seconds, ServerUrl, Words
from lisa_lightning.engine._completions import CompletionGenerator, list_models
from lisa_lightning.engine._server import run_server, split_command
from lisa_lightning.engine.base import ModelToAnswer
from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question
from lisa_lightning.evaluation.scores import model_without_variant
from lisa_lightning.runtime.endpoint import EndpointClient, Limits, Wording
from lisa_lightning.runtime.endpoint_url import split_url
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.ranks import OneProcess, Ranks, on_rank_zero

MODELS: Final = {"aligned", "final"}
MAX_LISTED: Final = 5
"""Maximum number of models in a message."""


def _check_served(served: dict[str, str | None]) -> dict[str, str | None]:
    if served.keys() != MODELS:
        raise ValueError("other models")
    return served


Served = Annotated[
    dict[str, Name | None], AfterValidator(_check_served), Words("a mapping of aligned and final to names or null")
]


@final
@dataclass(frozen=True, config={**STRICT, "hide_input_in_errors": True})
class EndpointEngine:
    """Engine that asks any OpenAI-compatible server through `/v1/completions`, with prompts of our template.

    Either a server runs already at `base_url`, or the run starts and stops one by `command`, which serves the aligned
    and then the final model. Only rank zero asks. Answers depend on the server too, so that it is a part of their key.

    Limits: the weights at `base_url` are not compared with those of the run. The precision is the server's, also with
    `command`. Draws are reproducible as far as the server honours `seed`.

    Raises:
        UserError: if not exactly one of `base_url` and `command` is set, `command` lacks a placeholder or names no
            program, or the API key is missing.
    """

    base_url: ServerUrl | None
    """URL of a running server, ending in /v1; null with `command`."""
    command: Phrase | None
    """Command that serves {model} at {port}, run without a shell; null with `base_url`. No key belongs here, since the
    config is stored."""
    served: Served
    """Names of the models at the server. null for the only one that it lists, with `command` for the folder."""
    api_key_variable: Name | None
    """Environment variable of the API key; null for a server without one."""
    concurrency: Concurrency
    """Number of simultaneous requests."""
    retries: Retries
    """Retries of a request that fails temporarily."""
    timeout_s: Seconds
    """Timeout of a request in seconds."""
    start_timeout_s: Annotated[float, Field(gt=0, le=86400)]
    """Seconds until the server of `command` must be ready."""

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.command is None):
            problem = "neither is set" if self.base_url is None else "both are set"
            raise UserError(
                f"engine.base_url and engine.command: {problem}. Fix: set engine.base_url to the URL of a running "
                "server, or engine.command to a command that starts one"
            )
        if self.command is not None:
            split_command(self.command)
        # A missing key shows now rather than after hours of training.
        self._client(self.base_url or "http://localhost", "")

    @property
    def title(self) -> str:
        """Return the address or the command."""
        return f"endpoint at {self.base_url}" if self.base_url else f"endpoint by {self.command}"

    def key(self, name: str, ranks: Ranks) -> dict[str, Any]:
        """Return the command, or address, id of the model and kind of the server; see `Engine.key`.

        Servers at two addresses may serve other weights under the same name. The port of a command changes nothing.
        """
        if self.command is not None:
            return {"engine": {"name": "endpoint", "command": self.command}}
        assert self.base_url is not None
        model, owner = on_rank_zero(ranks, partial(self._find_model, name))
        address = split_url(self.base_url, "engine.base_url").bare
        return {"engine": {"name": "endpoint", "url": address, "model": model, "server": owner}}

    def answers(
        self, evaluator: Evaluator, model: ModelToAnswer, questions: Sequence[Question], origin: str, path: Path
    ) -> list[Answer]:
        """Return the answers on rank zero, [] on other ranks; see `Engine.answers`."""
        if not evaluator.fabric.is_global_zero:
            return []
        # A resumed evaluation asks single prompts again rather than batches.
        evaluator = replace(evaluator, fabric=OneProcess(), batch_size=1)
        with self._serving(model) as (url, served):
            client = self._client(url, served)
            generator = CompletionGenerator(
                client, served, evaluator.tokenizer, evaluator.prompting, evaluator.decoding
            )
            return evaluator.collect(generator, questions, model.name, origin, path)

    @contextmanager
    def _serving(self, model: ModelToAnswer) -> Iterator[tuple[str, str]]:
        """Yield the URL of a server and the name of the model there."""
        if self.base_url is not None:
            yield self.base_url, self._find_model(model.name)[0]
            return
        assert self.command is not None
        file = re.sub("[^A-Za-z0-9]+", "_", model.name)
        folder, log = model.export(), model.out / f"server_{file}.log"
        if torch.cuda.is_initialized():
            # The server can't use memory that this process reserves.
            torch.cuda.empty_cache()
        words = split_command(self.command)
        with run_server(words, folder, log, self.start_timeout_s, self.api_key_variable) as url:
            yield url, self._configured_name(model.name) or str(folder)

    def _configured_name(self, name: str) -> str | None:
        """Return the name in `served`, which is the same for all variants of the evaluation."""
        return self.served[model_without_variant(name)]

    def _find_model(self, name: str) -> tuple[str, str]:
        """Return id and owner of a model at `base_url`.

        Raises:
            UserError: if no server answers, or `served` has no name and the server does not list exactly one model.
        """
        assert self.base_url is not None
        listed = list_models(self._client(self.base_url, ""), f"engine.base_url={self.base_url}")
        configured = self._configured_name(name)
        if configured is not None:
            owner = next((model.owner for model in listed if model.id == configured), "")
            return configured, owner
        if len(listed) == 1:
            return listed[0]
        names = ", ".join(printable(model.id)[:100] for model in listed[:MAX_LISTED]) or "none"
        name = model_without_variant(name)
        raise UserError(
            f"engine.served.{name}=null: the server at {self.base_url} lists {len(listed)} models ({names}). Fix: set "
            f"engine.served.{name} to the name of the {name} model there"
        )

    def _client(self, url: str, model: str) -> EndpointClient:
        wording = Wording(
            "engine", printable(model)[:100], "engine.served", "/completions", "Finished answers are kept"
        )
        limits = Limits(self.concurrency, self.retries, self.timeout_s)
        is_child = self.command is not None
        return EndpointClient(wording, split_url(url, "engine.base_url"), self.api_key_variable, limits, is_child)
