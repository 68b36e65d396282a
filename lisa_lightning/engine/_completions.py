"""Answers through the completions of an OpenAI-compatible server: `CompletionGenerator`, and `list_models`."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, final

from transformers import PreTrainedTokenizerBase

from lisa_lightning.data.templates import MARKER
from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.generator import Generated, Prompt
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.runtime.endpoint import EndpointClient
from lisa_lightning.runtime.endpoint_reply import Reply, read_reply
from lisa_lightning.runtime.errors import UserError, first_line, printable

log = logging.getLogger(__name__)
SEED_BITS: Final = 31
"""Bits of a seed that every server accepts."""


class ListedModel(NamedTuple):
    """A model that a server lists."""

    id: str
    owner: str
    """Field `owned_by`, which names the kind of many servers, such as `vllm`; "" without it."""


def list_models(client: EndpointClient, key: str) -> list[ListedModel]:
    """Return the models that a server lists; [] if it lists none, or has no list.

    Args:
        client: client of the server.
        key: config key of the server's address, with its value.

    Raises:
        UserError: if no server answers.
    """
    import openai

    def request(api: Any) -> Reply:
        try:
            with api.with_options(max_retries=0).models.with_streaming_response.list() as response:
                return read_reply(response.iter_bytes(), client.limits.timeout_s)
        except openai.APIConnectionError as error:
            cause = client.masked(first_line(error.__cause__ or error))[:200]
            raise UserError(
                f"{key}: no server answers ({cause}). Fix: start one, correct the address, or let engine.command "
                "start one"
            ) from None
        except (openai.InternalServerError, openai.NotFoundError) as error:
            # Some servers have no list. `transformers serve` fails if the hub's cache, which it lists, does not exist.
            return Reply(problem=first_line(error))

    with client.connect() as api:
        reply = client.call(request, api)
    match reply.value:
        case {"data": [*entries]}:
            return [_listed_model(e) for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)]
        case _:
            return []


def _warn_equal_samples(samples: Sequence[Sequence[str]]) -> None:
    """Log a warning if all samples of each prompt are equal."""
    if samples and all(len(set(texts)) == 1 for texts in samples):
        log.warning(
            "engine: all samples of each prompt are equal, as if the server ignored evaluate.temperature. "
            "`transformers serve` does, unless the model's generation config has do_sample."
        )


def _listed_model(entry: dict[str, Any]) -> ListedModel:
    return ListedModel(entry["id"], str(entry.get("owned_by") or ""))


@final
class CompletionGenerator:
    """Asks a server to continue prompts by `/v1/completions`, many at once.

    A prompt is sent as token ids, so that the server can't add a token to it. A server that takes only text receives
    the text of the prompt if its tokens are exactly these ids. Each reply's number of prompt tokens is compared with
    the number of ids.

    Args:
        client: client of the server.
        model: id of the model there.
        tokenizer: tokenizer of the model.
        prompting: makes the text of a prompt.
        decoding: generation of answers to safety prompts.
    """

    def __init__(
        self,
        client: EndpointClient,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        prompting: Prompting,
        decoding: Decoding,
    ) -> None:
        self._client, self._model = client, model
        self._tokenizer, self._prompting, self._decoding = tokenizer, prompting, decoding
        self._sends_ids = True

    def generate(self, batches: Sequence[Sequence[Prompt]]) -> Iterator[list[Generated]]:
        """Yield the answer to one prompt at a time, in order.

        Raises:
            UserError: if the server can't be reached, rejects a prompt, counts other tokens than the tokenizer, or
                ignores the maximum length.
        """
        prompts = [prompt for batch in batches for prompt in batch]
        self._choose_form(prompts[0])
        answers = self._client.request_all(prompts, self._answer)
        samples: dict[tuple[int, ...], list[str]] = defaultdict(list)
        # Only a strict zip reads on after the last answer, where a failure is raised.
        for prompt, answer in zip(prompts, answers, strict=True):
            if answer is not None:
                samples[tuple(prompt.input_ids)].append(answer.text)
                yield [answer]
        _warn_equal_samples([texts for texts in samples.values() if len(texts) > 1])

    def _choose_form(self, prompt: Prompt) -> None:
        """Try a prompt as ids, and send texts from then on if the server rejects ids."""
        import openai

        def request(api: Any) -> None:
            try:
                self._send(api, prompt, 1)
            except (openai.BadRequestError, openai.UnprocessableEntityError):
                self._sends_ids = False
                self._send(api, prompt, 1)

        with self._client.connect() as api:
            self._client.call(request, api)

    def _answer(self, api: Any, index: int, prompt: Prompt) -> Generated:
        problem = ""
        for _ in range(2):
            reply = self._send(api, prompt, prompt.max_new_tokens)
            match reply.value:
                case {"choices": [{"text": str(text), **choice}, *_], **rest}:
                    self._refuse_other_counts(rest.get("usage"), prompt)
                    # JSON can contain half a surrogate pair, which no file can.
                    text = self._prefill(prompt) + text.encode(errors="replace").decode()
                    # A server may stop at the marker with its last token.
                    cut_off = choice.get("finish_reason") == "length" and MARKER not in text
                    return Generated(prompt.question_indices, text, cut_off)
                case _:
                    problem = reply.problem or "its JSON holds no choices[0].text"
        raise UserError(
            f"{self._client.address}: no completion for prompt {index + 1} in two replies (problem of the last one: "
            f"{problem}). Fix: correct engine.base_url, which ends before /completions. "
            f"{self._client.wording.kept}"
        )

    def _send(self, api: Any, prompt: Prompt, max_tokens: int) -> Reply:
        is_sampled = prompt.is_safety and self._decoding.temperature > 0
        options: dict[str, Any] = {"temperature": self._decoding.temperature if is_sampled else 0}
        if is_sampled:
            seed = self._decoding.draw_seed(prompt.input_ids, prompt.sample) % 2**SEED_BITS
            options |= {"top_p": self._decoding.top_p, "seed": seed}
        # Streaming avoids that the library parses the body or reads it without a limit.
        with api.completions.with_streaming_response.create(
            model=self._model,
            prompt=prompt.input_ids if self._sends_ids else self._text(prompt),
            max_tokens=max_tokens,
            stop=[MARKER],
            # `transformers serve` derives its repetition penalty from this one, instead of the model's default.
            frequency_penalty=0,
            **options,
        ) as response:
            return read_reply(response.iter_bytes(), self._client.limits.timeout_s)

    def _text(self, prompt: Prompt) -> str:
        """Return a text that the server's tokenizer turns into the prompt's ids, start token included.

        Raises:
            UserError: if there is no such text.
        """
        text = self._prompting.text(self._tokenizer, prompt.request, prompt.context) + self._prefill(prompt)
        start = self._tokenizer.bos_token
        # A chat template writes the start token, which most servers add.
        for candidate in (text, text.removeprefix(str(start)) if start else text):
            if self._tokenizer(candidate)["input_ids"] == prompt.input_ids:
                return candidate
        raise UserError(
            f"{self._client.address}: it takes prompts as text only, and no text has the tokens of this prompt. Fix: "
            "use a server that takes token ids (vLLM, SGLang, llama.cpp), or leave out evaluate.prefill"
        )

    def _prefill(self, prompt: Prompt) -> str:
        return self._prompting.prefill if prompt.prefill else ""

    def _refuse_other_counts(self, usage: Any, prompt: Prompt) -> None:
        """Raise UserError if the server counts other prompt tokens than ours, or more new tokens than allowed."""
        if not isinstance(usage, dict):
            return
        counted, expected = usage.get("prompt_tokens"), len(prompt.input_ids)
        # Every prompt has tokens: a 0 means no count.
        if type(counted) is int and counted > 0 and counted != expected:
            raise UserError(
                f"{self._client.address}: it counts {counted} tokens in a prompt of {expected}, so that it serves "
                f"another model than {printable(self._model)[:100]} of this run, or adds tokens. Fix: serve the model "
                "of this run with its own tokenizer"
            )
        new = usage.get("completion_tokens")
        if type(new) is int and new > prompt.max_new_tokens:
            raise UserError(
                f"{self._client.address}: an answer has {new} tokens where {prompt.max_new_tokens} are allowed, so "
                "that it ignores max_tokens. Fix: use another server"
            )
