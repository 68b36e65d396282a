"""The judge that is asked for a word: a tiny random model, with its verdict checked against its logits."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from helpers.judge_models import PAIRS, guarding
from lisa_lightning.data.tokens import first_ids
from lisa_lightning.judge import _causal_model
from lisa_lightning.judge.base import Pair
from lisa_lightning.judge.llama_guard import LlamaGuardJudge
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.errors import UserError


def test_the_verdict_is_the_softmax_of_the_two_words(guard: Path) -> None:
    tokenizer = load_tokenizer(guard)
    model = LlamaForCausalLM.from_pretrained(guard).eval()
    safe, unsafe = (tokenizer(word)["input_ids"][0] for word in ("s", "u"))
    verdicts = guarding(guard, PAIRS)
    for pair, verdict in zip(PAIRS, verdicts, strict=True):
        text = f"<user>{pair.prompt}<assistant>{pair.response}<verdict>\n\n"
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1]
        wanted = float((logits[unsafe] - logits[safe]).sigmoid())
        assert verdict.score == pytest.approx(wanted, abs=1e-5)
        assert (verdict.flagged, verdict.partly) == (wanted > 0.5, False)
    turned = guarding(guard, PAIRS, safe="unsafe", unsafe="safe")
    assert [v.score for v in turned] == pytest.approx([1 - v.score for v in verdicts], abs=1e-6)
    assert all(a.flagged != b.flagged for a, b in zip(verdicts, turned, strict=True))


def test_a_long_answer_is_cut_and_the_template_is_not(guard: Path) -> None:
    tokenizer = load_tokenizer(guard)
    pair = PAIRS[3]
    room = 100 - len(tokenizer(f"<user>{pair.prompt}<assistant><verdict>\n\n")["input_ids"])
    short = Pair(pair.prompt, pair.response[:room])
    (whole,), (cut,) = guarding(guard, [short]), guarding(guard, [pair], max_length=100)
    assert cut.partly
    assert cut.score == pytest.approx(whole.score, abs=1e-6)
    with pytest.raises(UserError, match="max_length=35 is too small: template and request alone take"):
        guarding(guard, [pair], max_length=35)
    with pytest.raises(UserError, match="max_length=20 is too small: the template takes"):
        guarding(guard, [], max_length=20)


def test_words_that_can_not_be_told_apart_and_models_that_are_no_guards(guard: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match="'safe' and 'sound' begin with the same token"):
        guarding(guard, [], unsafe="sound")
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        guarding(tiny, [])


def test_a_template_replaces_the_chat_template(guard: Path, tiny: Path, tmp_path: Path) -> None:
    template = "<user>{prompt}<assistant>{response}<verdict>"
    verdicts = guarding(guard, PAIRS, template=template)
    for verdict, expected in zip(verdicts, guarding(guard), strict=True):
        assert verdict.score == pytest.approx(expected.score, abs=1e-6)
    plain = shutil.copytree(guard, tmp_path / "plain")
    load_tokenizer(tiny).save_pretrained(plain)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template\. Fix: .* set judge\.llama_guard\.template to"):
        guarding(plain)
    assert guarding(plain, PAIRS, template=template) == verdicts
    with pytest.raises(UserError, match=r"judge\.llama_guard\.template: a placeholder is missing\. Fix: "):
        guarding(guard, template="{prompt}")


def test_a_template_changes_the_version_and_its_absence_does_not(guard: Path) -> None:
    settings: dict[str, Any] = {
        "revision": None,
        "dtype": "float32",
        "before": "\n\n",
        "safe": "safe",
        "unsafe": "unsafe",
    }
    judge = LlamaGuardJudge(str(guard), template=None, max_length=4096, **settings)
    # This hash is that of versions without the key, so that their verdicts stay in the cache.
    assert judge.version == short_hash([1, judge._weights[1], "float32", "\n\n", "safe", "unsafe", 4096])
    assert (
        LlamaGuardJudge(str(guard), template="{prompt}{response}", max_length=4096, **settings).version != judge.version
    )


@pytest.mark.slow
def test_a_very_long_answer_has_the_verdict_of_its_beginning(guard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def counting(tokenizer: Any, text: str, limit: int | None, **options: Any) -> list[int]:
        ids = first_ids(tokenizer, text, limit, **options)
        lengths.append(len(ids))
        return ids

    monkeypatch.setattr(_causal_model, "first_ids", counting)
    for words in ("a b ", "word", "answer 1\n"):
        pairs = [Pair("request 1", words * count) for count in (100, 20_000, 1_000_000)]
        wanted, *others = guarding(guard, pairs, max_length=100)
        assert wanted.partly
        for verdict in others:
            assert (verdict.flagged, verdict.partly) == (wanted.flagged, True)
            assert verdict.score == pytest.approx(wanted.score, abs=1e-6)
    assert max(lengths) < 100_000


@pytest.mark.slow
def test_a_very_long_request_is_refused(guard: Path) -> None:
    for response in ("", "answer 1", "answer 1 " * 100_000):
        with pytest.raises(UserError, match=r"max_length=100 is too small: .* at least \d+ tokens\. Fix: "):
            guarding(guard, [Pair("request 1 " * 1_000_000, response)], max_length=100)
