"""Answers of a server against those of this process: order, retries, resumption, and servers that fail."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from helpers.completion_server import Completions, Reply, completion, model_reply
from helpers.composing import composed
from helpers.serving import serving
from lisa_lightning.engine.base import ModelToAnswer
from lisa_lightning.engine.endpoint import EndpointEngine
from lisa_lightning.engine.transformers import TransformersEngine
from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.evaluator import Answer, Evaluator, Question, read_answers
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.ranks import OneProcess

QUESTIONS = [Question("harmful", f"request {i % 6}") for i in range(9)]
QUESTIONS += [Question("task", "sign", f"sentence {i}", "positive") for i in range(3)]
LIMITS = {"harmful": 12, "task": 7}
ONE = [Question("harmful", "request")]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(Completions, "asked", [])
    monkeypatch.setattr(Completions, "models", [{"id": "m", "owned_by": "vllm"}])
    with serving(Completions) as address:
        yield f"{address}/v1"


def engine(url: str | None, **more: Any) -> EndpointEngine:
    settings: dict[str, Any] = {
        "base_url": url,
        "command": None,
        "served": {"aligned": None, "final": None},
        "api_key_variable": None,
        "concurrency": 4,
        "retries": 2,
        "timeout_s": 20.0,
        "start_timeout_s": 20.0,
    }
    return EndpointEngine(**settings | more)


def evaluator(tiny: Path, prompting: Prompting | None = None, **more: Any) -> Evaluator:
    return Evaluator(OneProcess(), load_tokenizer(tiny), prompting or Prompting("alpaca"), LIMITS, 4, **more)


def answered(
    url: str,
    reply: Reply,
    collector: Evaluator,
    questions: list[Question] = QUESTIONS,
    path: Path | None = None,
    **more: Any,
) -> list[Answer]:
    Completions.reply = staticmethod(reply)
    model = ModelToAnswer("final", lambda: None, Path, Path())
    return engine(url, **more).answers(collector, model, questions, "x", path)  # type: ignore[arg-type]


def sharpened(tiny: Path, folder: Path) -> Path:
    """Return a model with longer answers."""
    model: Any = load(tiny, "float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return folder


PROMPTINGS = (
    Prompting("alpaca"),
    Prompting("alpaca_newline", system="Be kind."),
    Prompting("alpaca", prefill="Sure, here is"),
)


@pytest.mark.parametrize("takes_ids", [True, False], ids=["ids", "text"])
def test_greedy_answers_equal_those_of_this_process(tiny: Path, tmp_path: Path, url: str, takes_ids: bool) -> None:
    cut = set()
    for folder in (tiny, sharpened(tiny, tmp_path / "model")):
        net, reply = load(folder, "float32"), model_reply(folder, takes_ids)
        for prompting in PROMPTINGS:
            collector = evaluator(folder, prompting)
            expected = collector.answers(net, QUESTIONS, "final", "x")
            assert answered(url, reply, collector) == expected
            cut |= {a.cut_off for a in expected}
    assert cut == {True, False}
    forms = {type(body["prompt"]) for body in Completions.asked if body["max_tokens"] > 1}
    assert forms == {list if takes_ids else str}


def test_a_start_token_is_never_doubled(tiny: Path, url: str) -> None:
    """A server that takes text adds the start token, which a chat template writes too."""
    collector = evaluator(tiny, Prompting("chat"))
    tokenizer: Any = collector.tokenizer
    tokenizer.bos_token = "<unk>"
    tokenizer.chat_template = "{{ bos_token }}[{{ messages[0].content }}]"
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    alpaca = replace(collector, prompting=Prompting("alpaca"))

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if not isinstance(body["prompt"], str):
            return 422, {"detail": "Input should be a valid string"}
        return 200, completion("yes", prompt_tokens=len(tokenizer(body["prompt"])["input_ids"]))

    for each in (collector, alpaca):
        assert [a.response for a in answered(url, reply, each, ONE)] == ["yes"]
    assert [body["prompt"][:8] for body in Completions.asked if isinstance(body["prompt"], str)][::2] == [
        "[request",
        "Below is",
    ]


def test_a_request_has_ids_limits_stop_and_no_draws(tiny: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", "sk-0123456789")
    answered(url, lambda _: (200, completion("yes")), evaluator(tiny), ONE, api_key_variable="SERVER_KEY")
    expected = Prompting("alpaca").encode(load_tokenizer(tiny), "request")
    assert Completions.asked[-1] == {
        **{"model": "m", "prompt": expected, "max_tokens": 12, "temperature": 0, "frequency_penalty": 0},
        **{"stop": ["### Response:"], "authorization": "Bearer sk-0123456789", "path": "/v1/completions"},
    }


def test_draws_have_a_seed_for_each_sample_and_task_rows_none(tiny: Path, url: str) -> None:
    decoding = Decoding(samples=2, temperature=0.7, top_p=0.9, seed=3)
    questions = [Question("harmful", f"request {i}", sample=s) for i in range(2) for s in range(2)] + [QUESTIONS[-1]]
    for _ in range(2):
        answered(url, lambda _: (200, completion("yes")), evaluator(tiny, decoding=decoding), questions)
    asked = [body for body in Completions.asked if body["max_tokens"] > 1]
    draws = [(b.get("temperature"), b.get("top_p"), b.get("seed")) for b in asked]
    assert sorted(map(str, draws[:5])) == sorted(map(str, draws[5:]))
    seeds = {seed for _, _, seed in draws if seed is not None}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert draws.count((0, None, None)) == 2
    assert {(t, p) for t, p, seed in draws if seed is not None} == {(0.7, 0.9)}


def test_equal_samples_are_reported(tiny: Path, url: str, caplog: pytest.LogCaptureFixture) -> None:
    questions = [Question("harmful", f"request {i}", sample=s) for i in range(2) for s in range(2)]
    collector = evaluator(tiny, decoding=Decoding(samples=2, temperature=0.7))
    answered(url, lambda body: (200, completion(str(body["seed"]))), collector, questions)
    assert not caplog.records
    answered(url, lambda _: (200, completion("yes")), collector, questions)
    assert ["all samples of each prompt are equal" in record.message for record in caplog.records] == [True]


def test_order_is_kept_however_late_a_reply_comes(tiny: Path, url: str) -> None:
    tokenizer = load_tokenizer(tiny)

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = str(tokenizer.decode(body["prompt"]))
        time.sleep(0.05 * ("request 1" in text))
        return 200, completion(text.partition("### Instruction:\n")[2].split("\n")[0])

    questions = QUESTIONS[:9]
    assert [a.response for a in answered(url, reply, evaluator(tiny), questions)] == [q.prompt for q in questions]


@pytest.mark.slow
def test_temporary_failures_are_tried_again(tiny: Path, url: str) -> None:
    replies = iter([(200, completion("")), (503, {}), (429, {}), (200, b"<html>"), (200, completion("yes"))])
    assert answered(url, lambda _: next(replies), evaluator(tiny), ONE)[0].response == "yes"


@pytest.mark.parametrize(
    ("text", "reason", "expected"),
    [
        (" yes \n", "stop", ("yes", False)),
        ("yes", "length", ("yes", True)),
        ("yes\n### Response: no", "stop", ("yes", False)),
        ("yes\n### Response:", "length", ("yes", False)),
        ("yes", "eos_token", ("yes", False)),
        ("", "stop", ("", False)),
        ("a\ud800b", "stop", ("a?b", False)),
    ],
)
def test_answers_are_finished_as_in_this_process(
    tiny: Path, url: str, text: str, reason: str, expected: tuple[str, bool]
) -> None:
    (answer,) = answered(url, lambda _: (200, completion(text, reason)), evaluator(tiny), ONE)
    assert (answer.response, answer.cut_off) == expected


def test_an_interrupted_evaluation_asks_only_for_missing_answers(tiny: Path, tmp_path: Path, url: str) -> None:
    path, tokenizer = tmp_path / "responses.jsonl", load_tokenizer(tiny)

    def failing(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        is_due = "request 2" in str(tokenizer.decode(body["prompt"])) and body["max_tokens"] > 1
        return (400, {"error": {"message": "too hot"}}) if is_due else (200, completion("yes"))

    with pytest.raises(UserError, match=r"^engine at .*refuses the request \(.*too hot.*Finished answers are kept$"):
        answered(url, failing, evaluator(tiny), path=path, concurrency=1)
    stored = read_answers(path)
    assert 0 < len(stored) < len(QUESTIONS)
    path.write_text(path.read_text() + path.read_text()[:30])  # a kill in the middle of a line
    Completions.asked.clear()
    answers = answered(url, lambda _: (200, completion("yes")), evaluator(tiny), path=path)
    assert [a.index for a in answers] == list(range(len(QUESTIONS)))
    distinct = len({(q.prompt, q.context) for q in QUESTIONS})
    done = len({(a.prompt, a.context) for a in stored})
    assert len([body for body in Completions.asked if body["max_tokens"] > 1]) == distinct - done
    Completions.asked.clear()
    assert answered(url, lambda _: (500, {}), evaluator(tiny), path=path) == answers
    assert Completions.asked == []


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (completion("yes", prompt_tokens=3), r"it counts 3 tokens in a prompt of \d+, so that it serves another model"),
        (completion("yes", completion_tokens=13), "an answer has 13 tokens where 12 are allowed"),
        (b"<html>", "no completion for prompt 1 in two replies .*no valid JSON"),
        ({"choices": [{"message": {"content": "yes"}}]}, r"no completion .*no choices\[0\]\.text"),
    ],
)
def test_replies_that_can_not_be_right_are_refused(
    tiny: Path, tmp_path: Path, url: str, body: Any, sentence: str
) -> None:
    path = tmp_path / "responses.jsonl"
    with pytest.raises(UserError, match=rf"^engine at {url}: {sentence}.* Fix: "):
        answered(url, lambda _: (200, body), evaluator(tiny), ONE, path)
    assert read_answers(path) == []


def test_a_prompt_without_a_text_is_refused_by_a_server_of_texts(tiny: Path, url: str) -> None:
    collector = evaluator(tiny)
    tokenizer: Any = collector.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 0)])
    with pytest.raises(UserError, match="takes prompts as text only, and no text has the tokens"):
        answered(url, lambda _: (400, {}), collector, ONE)


def test_the_model_at_a_running_server_is_found_or_named(tiny: Path, url: str) -> None:
    expected = {"name": "endpoint", "url": url, "model": "m", "server": "vllm"}
    assert engine(url).key("final", OneProcess()) == {"engine": expected}
    assert engine(url, concurrency=9, retries=0).key("aligned", OneProcess()) == engine(url).key("final", OneProcess())
    named = engine(url, served={"aligned": "m", "final": "other"})
    assert named.key("final", OneProcess()) == {"engine": expected | {"model": "other", "server": ""}}
    Completions.models.append({"id": "n"})
    with pytest.raises(UserError, match=r"engine\.served\.final=null: .*lists 2 models \(m, n\)\. Fix: set engine\.s"):
        engine(url).key("final", OneProcess())
    with pytest.raises(UserError, match=r"it knows no model other \(.*no such model.*Fix: correct engine\.served"):
        answered(
            url,
            lambda _: (404, {"error": {"message": "no such model; there are m, n"}}),
            evaluator(tiny),
            ONE,
            served={"aligned": "m", "final": "other"},
        )


def test_an_address_without_a_server_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^engine\.base_url=http://127\.0\.0\.1:9/v1: no server answers \(.*Fix: "):
        engine("http://127.0.0.1:9/v1").key("final", OneProcess())


def test_the_default_engine_adds_nothing_to_a_key() -> None:
    assert TransformersEngine().key("final", OneProcess()) == {}
    assert TransformersEngine().title == ""


def test_only_rank_zero_asks(tiny: Path, url: str) -> None:
    class OtherRank(OneProcess):
        is_global_zero = False
        global_rank, world_size = 1, 2

    collector = replace(evaluator(tiny), fabric=OtherRank())
    assert answered(url, lambda _: (500, {}), collector) == []
    assert Completions.asked == []


COMMAND = "engine.command='ls {model} --port {port}'"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "engine.base_url and engine.command: neither is set"),
        (["engine.base_url=http://localhost:1/v1", COMMAND], "engine.base_url and engine.command: both are set"),
        (["engine.command='ls --port {port}'"], r"engine.command=ls --port {port}: it lacks {model}"),
        (["engine.command='ls {model}'"], "it lacks {port}"),
        (["engine.command='no_such_program {model} {port}'"], "there is no program no_such_program"),
        (["engine.command='ls \"{model} {port}'"], "No closing quotation. Fix: close the quote"),
        ([COMMAND, "engine.api_key_variable=NO_SUCH_KEY"], "the environment variable NO_SUCH_KEY is not set"),
    ],
)
def test_an_engine_that_can_not_work_is_refused_before_a_model_is_made(
    words: list[str], sentence: str, tmp_path: Path
) -> None:
    from lisa_lightning.pipeline.run import run

    request = composed(["experiment=smoke", "engine=endpoint", *words, f"cache_dir={tmp_path / 'cache'}"], tmp_path)
    with pytest.raises(UserError) as error:
        run(replace(request, out=tmp_path / "out"))
    assert sentence in str(error.value)
    assert "Fix: " in str(error.value)
    assert not (tmp_path / "cache").exists()


BOTH = "engine.base_url=http://localhost:1/v1"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([COMMAND, "model.quantize=nf4"], "model.quantize=nf4: engine.command would serve merged weights"),
        ([BOTH], "one model at engine.base_url would answer for both"),
        ([BOTH, "engine.served.aligned=m", "engine.served.final=m"], "would answer for both"),
        ([BOTH, "+engine.served.other=m"], "must be a mapping of aligned and final"),
        ([BOTH, "engine.concurrency=0"], "engine.concurrency=0 is not allowed"),
        (["engine.base_url=http://me:secret@localhost/v1"], "engine.base_url=http://...@localhost/v1 is not allowed"),
    ],
)
def test_values_that_contradict_each_other_are_refused(words: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        composed(["experiment=smoke", "engine=endpoint", *words], tmp_path)
    assert sentence in str(error.value)
