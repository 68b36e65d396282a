"""The judge that is a classifier: tiny random classifiers, with numbers checked by hand."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from helpers.judge_models import LABELS, PAIRS, SHAPE, TEXT, moderation
from lisa_lightning.judge.base import Pair
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.errors import UserError


def by_hand(folder: Path, ids: list[int]) -> Tensor:
    """Return the classifier's logits at its last token, from the weights alone."""
    w = load_file(folder / "model.safetensors")
    heads, size = SHAPE["num_attention_heads"], SHAPE["hidden_size"] // SHAPE["num_attention_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[name]

    angles = torch.outer(torch.arange(len(ids)), 10_000.0 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)

    def turned(x: Tensor) -> Tensor:  # [heads, tokens, size]
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return x * angles.cos() + half * angles.sin()

    h = w["model.embed_tokens.weight"][ids]
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        x = norm(h, f"{at}input_layernorm.weight")
        q, k, v = (
            (x @ w[f"{at}self_attn.{n}_proj.weight"].T).view(len(ids), -1, size).transpose(0, 1)
            for n in ("q", "k", "v")
        )
        k, v = (t.repeat_interleave(heads // t.shape[0], dim=0) for t in (k, v))
        scores = turned(q) @ turned(k).transpose(1, 2) / size**0.5
        scores = scores + torch.full((len(ids), len(ids)), -torch.inf).triu(1)
        h = h + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w[f"{at}self_attn.o_proj.weight"].T
        x = norm(h, f"{at}post_attention_layernorm.weight")
        gate, up = (x @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        h = h + (torch.nn.functional.silu(gate) * up) @ w[f"{at}mlp.down_proj.weight"].T
    return (norm(h, "model.norm.weight") @ w["score.weight"].T)[-1]


def test_the_published_text_limit_and_threshold_with_logits_by_hand(classifier: Path) -> None:
    tokenizer = load_tokenizer(classifier)
    verdicts = list(moderation(classifier).verdicts(PAIRS))
    for pair, verdict in zip(PAIRS, verdicts, strict=True):
        text = f"BEGINNING OF CONVERSATION: USER: {pair.prompt} ASSISTANT:{pair.response}"
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        chances = by_hand(classifier, ids[:256]).sigmoid()
        assert verdict.score == pytest.approx(float(chances.max()), abs=1e-5)
        assert verdict.categories == {name: p > 0.5 for name, p in zip(LABELS, chances.tolist(), strict=True)}
        assert verdict.flagged == (float(chances.max()) > 0.5)
        assert verdict.partly == (len(ids) > 256)
    assert [v.partly for v in verdicts] == [False, False, False, True, False]
    assert {True, False} == {flag for v in verdicts for flag in v.categories.values()}


def test_places_are_filled_in_any_order(classifier: Path) -> None:
    tokenizer, pair = load_tokenizer(classifier), Pair("why {response}?", "so")
    (verdict,) = moderation(classifier, text="A: {response} Q: {prompt}").verdicts([pair])
    ids = [*tokenizer("A: so Q: why {response}?")["input_ids"], tokenizer.eos_token_id]
    assert verdict.score == pytest.approx(float(by_hand(classifier, ids).sigmoid().max()), abs=1e-5)


def test_company_does_not_change_a_verdict(classifier: Path) -> None:
    whole = list(moderation(classifier).verdicts(PAIRS * 10))
    alone = [next(moderation(classifier, batch_size=1).verdicts([pair])) for pair in PAIRS]
    for verdict, wanted in zip(whole, alone * 10, strict=True):
        assert verdict.score == pytest.approx(wanted.score, abs=1e-6)
        assert (verdict.flagged, verdict.partly) == (wanted.flagged, wanted.partly)
        assert verdict.categories == wanted.categories


def test_a_threshold_is_strict_and_settings_make_another_version(classifier: Path) -> None:
    (verdict,) = moderation(classifier).verdicts(PAIRS[:1])
    assert next(moderation(classifier, threshold=verdict.score).verdicts(PAIRS[:1])).flagged is False
    assert next(moderation(classifier, threshold=verdict.score - 1e-6).verdicts(PAIRS[:1])).flagged is True
    versions = {moderation(classifier, **more).version for more in ({}, {"threshold": 0.4}, {"max_length": 128})}
    assert len(versions) == 3
    assert moderation(classifier, batch_size=2).version in versions


def test_chosen_labels_alone_flag(classifier: Path) -> None:
    whole = next(moderation(classifier).verdicts(PAIRS[:1]))
    quiet = [name for name, flag in whole.categories.items() if not flag]
    verdict = next(moderation(classifier, harmful_labels=quiet).verdicts(PAIRS[:1]))
    assert (verdict.flagged, list(verdict.categories)) == (False, quiet)
    with pytest.raises(UserError, match=r"harmful_labels=\['nope'\]: .* Fix: name some of animal_abuse"):
        moderation(classifier, harmful_labels=["nope"])


def bert(folder: Path, tiny: Path, labels: list[str], problem_type: str | None) -> Tensor:
    """Save a tiny classifier that isn't a decoder in the folder, and return its logits of the first of PAIRS."""
    torch.manual_seed(0)
    names: Any = dict(enumerate(labels))
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=259,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            id2label=names,
            label2id={v: k for k, v in names.items()},
            problem_type=problem_type,  # type: ignore[arg-type]
        )
    ).eval()
    model.save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    text = TEXT.replace("{prompt}", PAIRS[0].prompt).replace("{response}", PAIRS[0].response)
    with torch.no_grad():
        return model(torch.tensor([[*load_tokenizer(tiny)(text)["input_ids"], 0]])).logits[0]


@pytest.mark.parametrize("problem_type", ["single_label_classification", None])
def test_a_softmax_classifier_of_another_architecture(tmp_path: Path, tiny: Path, problem_type: str | None) -> None:
    """Two labels have softmax scores, as one excludes the other, also if nothing states their relation."""
    logits = bert(tmp_path, tiny, ["neutral", "toxic"], problem_type)
    (verdict,) = moderation(tmp_path, harmful_labels=["toxic"]).verdicts(PAIRS[:1])
    assert verdict.score == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-6)
    assert list(verdict.categories) == ["toxic"]
    sentence = r"harmful_labels=None: .*labels that mean harm\. Fix: name some of neutral, toxic"
    with pytest.raises(UserError, match=sentence):
        moderation(tmp_path)


def test_more_labels_of_which_nothing_is_said_are_taken_as_published(tmp_path: Path, tiny: Path) -> None:
    logits = bert(tmp_path, tiny, ["drugs", "theft", "war"], None)
    (verdict,) = moderation(tmp_path).verdicts(PAIRS[:1])
    assert verdict.score == pytest.approx(float(logits.sigmoid().max()), abs=1e-6)
    assert list(verdict.categories) == ["drugs", "theft", "war"]


def test_a_long_answer_has_the_verdict_of_its_beginning(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = moderation(classifier)
    lengths: list[int] = []
    tokenizer = judge._tokenizer

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            lengths.append(len(text))
            return tokenizer(text, **options)

    monkeypatch.setitem(vars(judge), "_tokenizer", Counting())
    for words in ("a b ", "word", "\n", "\u00e9"):
        short, long = Pair("request 1", words * 300), Pair("request 1", words * 1_000_000)
        expected, verdict = judge.verdicts([short, long])
        assert (verdict.partly, expected.partly) == (True, True)
        assert verdict.score == pytest.approx(expected.score, abs=1e-6)
        assert verdict.categories == expected.categories
    assert max(lengths) < 100_000


@pytest.mark.parametrize(("max_length", "refused"), [(1023, False), (1024, False), (1025, True), (10**9, True)])
def test_no_limit_exceeds_the_positions_of_the_classifier(classifier: Path, max_length: int, refused: bool) -> None:
    if not refused:
        moderation(classifier, max_length=max_length)
        return
    sentence = (
        rf"judge\.moderation\.max_length={max_length}: .* 1024 positions\. Fix: judge\.moderation\.max_length=1024"
    )
    with pytest.raises(UserError, match=sentence):
        moderation(classifier, max_length=max_length)
