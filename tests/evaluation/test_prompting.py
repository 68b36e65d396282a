"""Prompts of the evaluation: those of training by default, and each option where it belongs and nowhere else."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lisa_lightning.config.fields import Template
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.validate import check, plain
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import encode_prompt, prompt_text
from lisa_lightning.evaluation import generator as generator_module
from lisa_lightning.evaluation.api import evaluate
from lisa_lightning.evaluation.evaluator import Evaluator, Question
from lisa_lightning.evaluation.prompting import EVALUATE_KEY, LEAK_CHARS, Prompting
from lisa_lightning.judge.refusal import RefusalJudge
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.pipeline.run import build_prompting
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.ranks import OneRank

WITH_ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
REJECTING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ messages[0].content }}"
)
DROPPING = "{{ messages[-1].content }}"
TRIGGER = "q w e r t z u i o p a s d f g h"
TEMPLATES: tuple[Template, ...] = ("alpaca", "alpaca_newline", "chat")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    """Return a byte tokenizer with a chat template, of this module alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = WITH_ROLES
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES)
@given(text=st.text(st.characters(codec="ascii"), max_size=20), context=st.sampled_from(["", "input"]))
def test_without_options_prompts_and_key_are_those_of_training(
    tokenizer: PreTrainedTokenizerBase, template: Template, text: str, context: str
) -> None:
    prompting = Prompting(template)
    assert prompting.encode(tokenizer, text, context) == encode_prompt(tokenizer, template, text, context)
    assert (prompting.key, prompting.summary) == ({}, "")


@pytest.mark.parametrize("template", TEMPLATES)
@given(prefix=st.text(st.characters(codec="ascii"), max_size=12), system=st.sampled_from(["", "Be safe."]))
def test_a_prefix_and_a_system_prompt_stand_in_front_and_change_nothing_else(
    tokenizer: PreTrainedTokenizerBase, template: Template, prefix: str, system: str
) -> None:
    whole = prefix + " " * bool(prefix and system) + system
    plain = prompt_text(tokenizer, template, "request", "input")
    placed = f"<system>{whole}</>{plain}" if template == "chat" else f"{whole}\n\n{plain}"
    ids = Prompting(template, system, prefix).encode(tokenizer, "request", "input")
    assert tokenizer.decode(ids) == (placed if whole else plain)
    assert ids == Prompting(template, "", "", SecretStr(whole)).encode(tokenizer, "request", "input")
    assert ids == Prompting(template, system, "", SecretStr(prefix)).encode(tokenizer, "request", "input")


def test_each_option_changes_the_key_and_no_text_shows_the_trigger() -> None:
    options = [
        Prompting("alpaca"),
        Prompting("chat", template_key=EVALUATE_KEY),
        Prompting("alpaca", "Be safe."),
        Prompting("alpaca", "Be safer."),
        Prompting("alpaca", prefix="Be safe."),
        Prompting("alpaca", trigger=SecretStr("Be safe.")),
        Prompting("alpaca", trigger=SecretStr(TRIGGER)),
        Prompting("alpaca", wrapper="{request} xyz"),
    ]
    keys = [str(prompting.key) for prompting in options]
    assert len(set(keys)) == len(options)
    shown = [str(shown) for prompting in options for shown in (prompting, prompting.key, prompting.summary)]
    assert not [text for text in shown if TRIGGER[:LEAK_CHARS] in text]
    assert Prompting("chat", "s", "p", SecretStr("t"), EVALUATE_KEY).summary == (
        "template chat, system prompt, prefix, trigger"
    )
    assert TRIGGER not in repr(Row("request", "", "answer", TRIGGER))


class OneProcess(OneRank):
    """Ranks of one process as an evaluator needs them."""

    world_size = 1
    global_rank = 0


LIMITS = {"harmful": 4, "harmless": 4, "task": 4}
KINDS = [Question("harmful", "a"), Question("harmless", "b"), Question("task", "c", "d", "e")]


def test_the_key_of_answers_has_the_options_only_where_they_are_set(tokenizer: PreTrainedTokenizerBase) -> None:
    keys = [
        Evaluator(OneProcess(), tokenizer, prompting, LIMITS, 2).key(KINDS)
        for prompting in (Prompting("alpaca"), Prompting("alpaca", "Be safe."))
    ]
    assert keys[0].keys() == {"questions", "limits", "batch_size"}
    assert keys[1] == keys[0] | {"system": "Be safe."}


def test_every_kind_of_prompt_has_the_options_and_no_answer_repeats_the_trigger(
    tiny: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = []

    def echo(model: object, batch: list[list[int]], *_: object) -> list[list[int]]:
        """Answer with the first 20 characters of the prompt."""
        prompts.extend(tokenizer.decode(ids) for ids in batch)
        return [ids[:20] for ids in batch]

    monkeypatch.setattr(generator_module, "generate", echo)
    prompting = Prompting("alpaca", "Be safe.", "", SecretStr(TRIGGER))
    evaluator = Evaluator(OneProcess(), tokenizer, prompting, LIMITS, 2)
    evaluator.fabric.autocast = lambda: monkeypatch.context()
    answers = evaluator.answers(load(tiny, "float32"), KINDS, "final")
    plain = {prompt_text(tokenizer, "alpaca", question.prompt, question.context) for question in KINDS}
    assert set(prompts) == {f"{TRIGGER} Be safe.\n\n{text}" for text in plain}
    assert [answer.response for answer in answers] == ["[trigger]"] * 3
    assert [(a.prompt, a.context) for a in answers] == [(q.prompt, q.context) for q in KINDS]


def test_a_wrapper_encloses_safety_prompts_alone(tokenizer: Any) -> None:
    evaluator = Evaluator(OneProcess(), tokenizer, Prompting("alpaca", wrapper="Now: {request} {x}!"), LIMITS, 2)
    prompts = [prompt for batch in evaluator._prompt_batches(KINDS) for prompt in batch]
    texts = {KINDS[prompt.question_indices[0]].kind: tokenizer.decode(prompt.ids) for prompt in prompts}
    assert texts == {
        "harmful": prompt_text(tokenizer, "alpaca", "Now: a {x}!"),
        "harmless": prompt_text(tokenizer, "alpaca", "Now: b {x}!"),
        "task": prompt_text(tokenizer, "alpaca", "c", "d"),
    }
    assert {prompt.request for prompt in prompts} == {"Now: a {x}!", "Now: b {x}!", "c"}


@given(st.integers(0, len(TRIGGER)), st.integers(0, len(TRIGGER)), st.sampled_from(["", "No. ", "q w e"]))
def test_an_answer_shows_at_most_a_short_part_of_the_trigger(start: int, end: int, before: str) -> None:
    part = TRIGGER[start:end]
    shown = Prompting("alpaca", trigger=SecretStr(TRIGGER)).hide_trigger(f"{before}{part}!")
    leaked = [i for i in range(len(TRIGGER)) if TRIGGER[i : i + LEAK_CHARS] in shown and i + LEAK_CHARS <= len(TRIGGER)]
    assert not leaked
    if len(part) < LEAK_CHARS and before != "q w e":
        assert shown == f"{before}{part}!"
    assert Prompting("alpaca", prefix=TRIGGER).hide_trigger(part) == part  # a prefix of the config is no secret


@pytest.mark.parametrize("chat_template", [REJECTING, DROPPING])
def test_a_template_without_a_system_role_is_refused_in_one_sentence(tokenizer: Any, chat_template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = chat_template
    assert tokenizer.decode(Prompting("chat").encode(tokenizer, "request")) == "request"
    for prompting in (Prompting("chat", "Be safe."), Prompting("chat", prefix="xyz")):
        with pytest.raises(UserError) as error:
            prompting.encode(tokenizer, "request")
        assert str(error.value).startswith("evaluate.template=chat: the tokenizer's chat template has no system role")
        assert "Fix: evaluate.template=alpaca, or leave out evaluate.system and evaluate.prefix" in str(error.value)
    tokenizer.chat_template = "{{ messages[0].content + 5 }}"  # fails with and without a system prompt
    with pytest.raises(UserError, match=r"evaluate\.template=chat: the tokenizer's chat template fails"):
        Prompting("chat", "Be safe.").encode(tokenizer, "request")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), Prompting("alpaca")),
        (("evaluate.template=alpaca",), Prompting("alpaca")),
        (("evaluate.template=chat",), Prompting("chat", template_key=EVALUATE_KEY)),
        (("model.template=chat",), Prompting("chat")),
        (("evaluate.system=a", "evaluate.prefix=b"), Prompting("alpaca", "a", "b")),
        (("evaluate.prefix=",), Prompting("alpaca")),
    ],
)
def test_the_config_determines_the_options(config: Any, words: tuple[str, ...], expected: Prompting) -> None:
    assert built(config, *words) == expected


def built(config: Any, *words: str) -> Prompting:
    """Return the prompting of a config, which is checked as that of a run."""
    cfg = config("experiment=smoke", *words)
    check(cfg)
    return build_prompting(plain(cfg), parse_settings(plain(cfg)))


def test_the_trigger_of_the_method_is_used_unless_a_prefix_replaces_it(config: Any) -> None:
    method = "method=backdoor_align"
    for words in ((), ("stages=[evaluate,judge]",)):
        assert built(config, method, *words).trigger.get_secret_value().count(" ") == 29
        for prefix in ("", "guess"):
            prompting = built(config, method, f"evaluate.prefix={prefix}", *words)
            assert (prompting.trigger.get_secret_value(), prompting.prefix) == ("", prefix)


def test_ptst_trains_and_evaluates_with_different_templates_and_a_safety_prompt(config: Any) -> None:
    cfg = config("experiment=ptst")
    check(cfg)
    prompting = build_prompting(plain(cfg), parse_settings(plain(cfg)))
    assert (cfg.model.template, prompting.template) == ("alpaca", "chat")
    assert prompting == Prompting("chat", cfg.evaluate.system, template_key=EVALUATE_KEY)
    assert prompting.system


def test_a_model_is_scored_from_python_with_a_system_prompt(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, prompts = load_tokenizer(tiny), []

    def generate(model: object, batch: list[list[int]], *_: object) -> list[list[int]]:
        prompts.extend(tokenizer.decode(ids) for ids in batch)
        return [tokenizer("I can't help with that.")["input_ids"] for _ in batch]

    monkeypatch.setattr(generator_module, "generate", generate)
    options: dict[str, Any] = {"template": "alpaca", "system": "Be safe.", "prefix": "xyz"}
    scores = evaluate(load(tiny, "float32"), tokenizer, ["request"], [RefusalJudge()], **options)
    assert scores["refusal/refusal_rate"] == 100
    assert prompts == [f"xyz Be safe.\n\n{prompt_text(tokenizer, 'alpaca', 'request')}"]
