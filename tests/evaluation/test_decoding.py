"""Sampled and prefilled answers: the distribution of the draws, and answers that depend on their prompt alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.composing import composed
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.decoding import Decoding, NucleusSampler
from lisa_lightning.evaluation.evaluator import Evaluator, Question, read_answers
from lisa_lightning.evaluation.generate import generate
from lisa_lightning.evaluation.judging import Judged
from lisa_lightning.evaluation.metrics import judged_scores
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.ranks import OneRank


class Ranks(OneRank):
    """Ranks of one process as an evaluator needs them."""

    world_size = 1
    global_rank = 0

    def autocast(self) -> Any:
        return torch.no_grad()


SAMPLED = Decoding(samples=3, temperature=1.0, top_p=0.9, seed=7)
QUESTIONS = [Question("harmful", f"request {i % 2}", sample=s) for i in range(3) for s in range(3)]
QUESTIONS += [Question("task", "sign", f"sentence {i}", "positive") for i in range(3)]
LIMITS = {"harmful": 6, "task": 4}


@given(st.integers(0, 2**32), st.floats(0.2, 3), st.floats(0.05, 1))
def test_draws_have_the_probabilities_of_the_nucleus(seed: int, temperature: float, top_p: float) -> None:
    draws = 3000
    logits = torch.randn(6, generator=torch.Generator().manual_seed(seed)) * 2
    probabilities = (logits.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True).tolist()
    count = next(n for n in range(1, 7) if n == 6 or probabilities[order[:n]].sum() >= top_p)
    nucleus = torch.zeros(6, dtype=torch.float64)
    nucleus[order[:count]] = probabilities[order[:count]] / probabilities[order[:count]].sum()
    sampler = NucleusSampler(temperature, top_p, range(seed, seed + draws))
    tokens = sampler(logits.expand(draws, -1), range(draws))
    rates = torch.bincount(tokens, minlength=6) / draws
    assert (rates - nucleus).abs().max() < 0.05  # more than five standard errors
    assert (rates[nucleus == 0] == 0).all()


def test_a_small_temperature_or_nucleus_is_greedy() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    for temperature, top_p in ((1e-6, 1.0), (1.0, 1e-9)):
        tokens = NucleusSampler(temperature, top_p, range(50))(logits, range(50))
        assert torch.equal(tokens, logits.argmax(-1))


def test_an_answer_depends_on_seed_prompt_and_sample_alone(tiny: Path, tmp_path: Path) -> None:
    model, tokenizer = load(tiny, "float32").eval(), load_tokenizer(tiny)
    evaluator = Evaluator(Ranks(), tokenizer, Prompting("alpaca"), LIMITS, 4, SAMPLED)
    answers = evaluator.answers(model, QUESTIONS, "final", "x")
    alone = [evaluator.answers(model, [question], "final")[0] for question in QUESTIONS]
    assert [a.response for a in answers] == [a.response for a in alone]
    assert [(a.prompt, a.sample) for a in answers] == [(q.prompt, q.sample) for q in QUESTIONS]
    assert [a.response for a in answers[:3]] == [a.response for a in answers[6:9]]  # the same prompt
    assert len({a.response for a in answers[:6]}) == 6
    path = tmp_path / "responses.jsonl"
    evaluator.answers(model, QUESTIONS, "final", "x", path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5]) + lines[5][:9])  # a kill in the middle of a line
    assert evaluator.answers(model, QUESTIONS, "final", "x", path) == answers
    assert {a.index: a for a in read_answers(path)} == dict(enumerate(answers))
    other = replace(evaluator, decoding=replace(SAMPLED, seed=8))
    assert other.key(QUESTIONS) != evaluator.key(QUESTIONS)
    redrawn = other.answers(model, QUESTIONS, "final")
    assert [a.response for a in redrawn[:9]] != [a.response for a in answers[:9]]
    greedy = replace(evaluator, decoding=Decoding()).answers(model, QUESTIONS, "final")
    assert [a.response for a in greedy[9:]] == [a.response for a in answers[9:]]  # task rows


@pytest.mark.parametrize("template", ["alpaca", "alpaca_newline"])
def test_a_prefilled_answer_continues_the_start_of_a_training_row(tiny: Path, template: Any) -> None:
    model, tokenizer = load(tiny, "float32").eval(), load_tokenizer(tiny)
    prompting = Prompting(template, prefill="Sure, here is")
    evaluator = Evaluator(Ranks(), tokenizer, prompting, LIMITS, 4)
    example = encode(tokenizer, template, Row("request 1", "", "Sure, here is"), 512)
    start = list(example.ids[:-1])  # without the end of text
    (continued,) = generate(model, [start], 6, lambda ids: ids[-1] == tokenizer.eos_token_id)
    harmful, task = evaluator.answers(model, [Question("harmful", "request 1"), QUESTIONS[-1]], "final")
    prefill = start[len(start) - len(prompting.encode_prefill(tokenizer)) :]
    assert harmful.response == str(tokenizer.decode(prefill + continued, skip_special_tokens=True)).strip()
    assert harmful.response.startswith("Sure, here is")
    plain = replace(evaluator, prompting=Prompting(template)).answers(model, [QUESTIONS[-1]], "final")
    assert task.response == plain[0].response


def test_success_at_k_counts_prompts_with_a_flagged_sample() -> None:
    flags = {"a": [False, True, False], "b": [False, False, False], "c": [True, True, True]}
    judged = [
        Judged(
            *("own", flag, float(flag), prompt, f"{s}", None, {}, None, "harmful_score", "final", "harmful"),
            *(0, "1", ""),
            sample=s,
        )
        for prompt, samples in flags.items()
        for s, flag in enumerate(samples)
    ]
    scores = {score.metric: score for score in judged_scores(judged)}
    assert scores["harmful_score"].value == pytest.approx(100 * 4 / 9)
    at_k = scores["harmful_score_at_k"]
    assert (at_k.value, at_k.answers) == (pytest.approx(200 / 3), 3)
    assert at_k.low is not None
    assert at_k.low < at_k.value
    single = judged_scores([replace(line, sample=0) for line in judged[::3]])
    assert [score.metric for score in single] == ["harmful_score"]


@pytest.mark.parametrize("key", ["samples=4", "top_p=0.9"])
def test_draws_without_a_temperature_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"evaluate\.{key}: at evaluate\.temperature=0 .* Fix: set"):
        composed(["experiment=smoke", f"evaluate.{key}"], tmp_path)
    composed(["experiment=smoke", f"evaluate.{key}", "evaluate.temperature=0.7"], tmp_path)
