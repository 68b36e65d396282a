"""WildGuard: its reply read line by line, and a tiny random Mistral that generates greedily."""

from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from helpers.judge_models import PAIRS, save_causal, shipped
from lisa_lightning.judge.base import Pair, Verdict
from lisa_lightning.judge.wildguard import WildGuardJudge, _answers
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.errors import UserError

PUBLISHED = "fa7f1c313ef1463a2fe249ff50c537adfbd84ff2fe82b3ffa72ee21124afb0d6"
"""SHA-256 of WILDGUARD_INPUT_FORMAT in wildguard/utils.py."""


@pytest.fixture(scope="module")
def guard_model(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("wildguard")
    save_causal(folder, tiny, MistralConfig, MistralForCausalLM, "<s>")
    return folder


def judge(folder: Path, **more: Any) -> WildGuardJudge:
    return WildGuardJudge(**shipped("wildguard", folder, **more))


def reply(request: str, refusal: str, response: str) -> str:
    return f"Harmful request: {request}\nResponse refusal: {refusal}\nHarmful response: {response}"


def test_the_prompt_is_the_published_one_with_one_start_token(guard_model: Path) -> None:
    template = judge(guard_model).template
    assert sha256(template.encode()).hexdigest() == PUBLISHED
    text = judge(guard_model)._text("Why?", "{prompt}")
    assert text.startswith("<s><|user|>\n[INST] You are a classifier")
    assert text.endswith("Human user:\nWhy?\n\nAI assistant:\n{prompt}\n\n---\n\nAnswers: [/INST]\n<|assistant|>\n")
    tokenizer = load_tokenizer(guard_model)
    ids, partly = judge(guard_model)._ids(Pair("Why?", "{prompt}"))
    assert (ids, partly) == (tokenizer(text, add_special_tokens=False)["input_ids"], False)
    assert (ids[0], ids.count(ids[0])) == (tokenizer.bos_token_id, 1)


def test_the_reply_is_greedy(guard_model: Path) -> None:
    guard, tokenizer = judge(guard_model, max_new_tokens=5), load_tokenizer(guard_model)
    model = MistralForCausalLM.from_pretrained(guard_model).eval()
    prompt, _ = guard._ids(PAIRS[0])
    ids = list(prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids[len(prompt) :]
    assert guard._reply(prompt) == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (reply("yes", "no", "yes"), (False, True)),
        (reply("Yes", "YES", "no"), (True, False)),
        (reply("no", "n/a", "N/A") + "\n", (None, None)),
        ("\n" + reply("no", " yes ", " no "), (True, False)),
        (reply("n/a", "no", "yes"), None),
        (reply("yes", "no", "maybe"), None),
        ("Harmful request: yes\nResponse refusal: no", None),
        ("Response refusal: no\nHarmful request: yes\nHarmful response: yes", None),
        ("", None),
    ],
)
def test_a_reply_has_three_lines_in_order(text: str, answers: tuple[bool | None, bool | None] | None) -> None:
    assert _answers(text) == answers


def test_verdicts_follow_the_lines_and_an_unread_reply_is_never_guessed(
    guard_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = iter([reply("yes", "no", "yes"), "hm", reply("yes", "yes", "no"), reply("no", "n/a", "n/a"), "hm"])

    def scripted(_: WildGuardJudge, ids: Sequence[int]) -> str:
        assert len(ids) <= 4096
        return next(replies)

    monkeypatch.setattr(WildGuardJudge, "_reply", scripted)
    verdicts = judge(guard_model).verdicts(PAIRS)
    assert list(islice(verdicts, 5)) == [
        Verdict(True, 1.0, refused=False, partly=False),
        None,
        Verdict(False, 0.0, refused=True, partly=False),
        Verdict(False, 0.0, refused=None, partly=False),
        None,
    ]
    with pytest.raises(UserError, match=r"2 of 5 replies are not the three lines .*first is to answer 2\)\. Fix: "):
        next(verdicts)


def test_a_long_answer_is_cut_and_marked(guard_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []

    def scripted(_: WildGuardJudge, ids: list[int]) -> str:
        prompts.append(ids)
        return reply("no", "no", "no")

    monkeypatch.setattr(WildGuardJudge, "_reply", scripted)
    pair = PAIRS[3]
    room = len(judge(guard_model)._prompt(pair.prompt, "")) + 30
    (cut,) = judge(guard_model, max_length=room).verdicts([pair])
    (whole,) = judge(guard_model).verdicts([Pair(pair.prompt, pair.response[:30])])
    assert cut is not None
    assert whole is not None
    assert (cut.partly, whole.partly) == (True, False)
    assert prompts[0] == prompts[1]


def test_invalid_input_is_refused_before_a_verdict(guard_model: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.wildguard\.template: a placeholder is missing\. Fix: "):
        judge(guard_model, template="{response}")
    with pytest.raises(UserError, match=r"judge\.wildguard\.max_length=50 is too small: the template takes"):
        judge(guard_model, max_length=50)
    with pytest.raises(UserError, match=r"judge\.wildguard\.id=.*5 of 5 replies .*\.max_new_tokens=1, or use another"):
        assert list(islice(judge(guard_model, max_new_tokens=1).verdicts(PAIRS), 6))
