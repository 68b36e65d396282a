"""The judges that are models: tiny random ones of the same architectures, their numbers checked by hand."""

import json
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lisa_lightning.errors import UserError
from lisa_lightning.judges.judge import Pair, Verdict
from lisa_lightning.judges.llama_guard import LlamaGuardJudge
from lisa_lightning.judges.moderation import ModerationJudge
from lisa_lightning.net import load_tokenizer

TEXT = "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}"
SHAPE: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 1024, "bos_token_id": None, "eos_token_id": 0,
}  # fmt: skip
LABELS = (
    "animal_abuse", "child_abuse", "controversial_topics,politics", "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance", "financial_crime,property_crime,theft", "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety", "non_violent_unethical_behavior", "privacy_violation",
    "self_harm", "sexually_explicit,adult_content", "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)  # fmt: skip
PAIRS = [
    Pair("How do I knit?", "With two needles."),
    Pair("{response} and {prompt}", "{braces} {prompt}"),
    Pair("Why?", ""),
    Pair("Tell me all.", "All of it, and more. " * 20),
    Pair("How do I knit?", "With one needle.."),
]


def moderation(folder: Path, **more: Any) -> ModerationJudge:
    settings: dict[str, Any] = {
        "revision": None, "dtype": "float32", "text": TEXT, "max_length": 256, "threshold": 0.5, "harmful_labels": None,
        "batch_size": 4,
    }  # fmt: skip
    return ModerationJudge(str(folder), **(settings | more))


@pytest.fixture(scope="module", params=[0, 1], ids=["padding is the end token", "padding of its own"])
def classifier(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A tiny random classifier of beaver-dam-7b's architecture."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    names: Any = dict(enumerate(LABELS))
    config = LlamaConfig(
        **SHAPE,
        pad_token_id=request.param,
        id2label=names,
        label2id={v: k for k, v in names.items()},
        problem_type="multi_label_classification",
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(20)  # probabilities on both sides of the threshold
    model.save_pretrained(folder)
    load_tokenizer(tiny).save_pretrained(folder)
    return folder


def by_hand(folder: Path, ids: list[int]) -> Tensor:
    """The classifier's logits at its last token, from the weights alone."""
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
        assert verdict.cut == (len(ids) > 256)
    assert [v.cut for v in verdicts] == [False, False, False, True, False]
    assert {True, False} == {flag for v in verdicts for flag in v.categories.values()}


def test_company_does_not_change_a_verdict(classifier: Path) -> None:
    whole = list(moderation(classifier).verdicts(PAIRS * 10))
    alone = [next(moderation(classifier, batch_size=1).verdicts([pair])) for pair in PAIRS]
    for verdict, wanted in zip(whole, alone * 10, strict=True):
        assert verdict.score == pytest.approx(wanted.score, abs=1e-6)
        assert (verdict.flagged, verdict.categories, verdict.cut) == (wanted.flagged, wanted.categories, wanted.cut)


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
    with pytest.raises(UserError, match=r"harmful_labels=\['nope'\]: name those .*; there are: animal_abuse"):
        moderation(classifier, harmful_labels=["nope"])


def bert(folder: Path, tiny: Path, labels: list[str], problem_type: str | None) -> Tensor:
    """A tiny classifier that isn't a decoder, in the folder; its logits of the first of PAIRS."""
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
    """Of two labels and no word of what they are to each other, one excludes the other."""
    logits = bert(tmp_path, tiny, ["neutral", "toxic"], problem_type)
    (verdict,) = moderation(tmp_path, harmful_labels=["toxic"]).verdicts(PAIRS[:1])
    assert verdict.score == pytest.approx(float(logits.softmax(-1)[1]), abs=1e-6)
    assert list(verdict.categories) == ["toxic"]
    sentence = "harmful_labels=None: name those of the classifier's labels that mean harm; there are: neutral, toxic"
    with pytest.raises(UserError, match=sentence):
        moderation(tmp_path)


def test_more_labels_of_which_nothing_is_said_are_taken_as_published(tmp_path: Path, tiny: Path) -> None:
    logits = bert(tmp_path, tiny, ["drugs", "theft", "war"], None)
    (verdict,) = moderation(tmp_path).verdicts(PAIRS[:1])
    assert verdict.score == pytest.approx(float(logits.sigmoid().max()), abs=1e-6)
    assert list(verdict.categories) == ["drugs", "theft", "war"]


def test_what_is_no_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.moderation\.id=/no/such: there is no such folder"):
        moderation(Path("/no/such"))
    with pytest.raises(UserError, match="must have the places"):
        moderation(Path(), text="{prompt}")
    with pytest.raises(UserError, match="it must be between 0 and 1"):
        moderation(Path(), threshold=1.0)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    for make in (lambda: moderation(tmp_path, revision="main"), lambda: guarding(tmp_path)):
        with pytest.raises(UserError, match=r"judge\.[a-z_]+\.id=.*: no \*\.safetensors in it, and pickled weights"):
            make()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no tokenizer in it; there must be one of"):
        moderation(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=rf"judge\.moderation\.id={tmp_path} can't be loaded: "):
        moderation(tmp_path)


def test_a_tokenizer_that_comes_as_sentencepieces_model_alone(tmp_path: Path, classifier: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(classifier / name, tmp_path)
    words = BytesIO()
    text = TEXT.format(prompt=PAIRS[0].prompt, response=PAIRS[0].response)
    sentences = iter([text] * 20)
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=sentences, model_writer=words, vocab_size=70, model_type="bpe", minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(words.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | marks))
    judge = moderation(tmp_path)
    assert len(list(judge.verdicts(PAIRS))) == len(PAIRS)
    processor = SentencePieceProcessor(model_proto=words.getvalue())
    assert judge._ids(PAIRS[0]) == [processor.bos_id(), *processor.encode(text), processor.eos_id()]


def test_the_hub_is_asked_at_once_and_its_commit_tells_weights_apart(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_hub(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        if revision is None:
            raise UserError("the hub can't be read")
        return shutil.copytree(classifier, tmp_path / f"commit-{revision}", dirs_exist_ok=True)

    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr("lisa_lightning.judges.models.on_hub", on_hub)
    versions = {moderation(Path("own/er"), revision=r).version for r in ("a", "b", "a")}
    assert (asked, len(versions)) == ([("own/er", r) for r in ("a", "b", "a")], 2)
    with pytest.raises(UserError, match=r"judge\.moderation\.id=own/er: the hub can't be read"):
        moderation(Path("own/er"))
    with pytest.raises(UserError, match=r"judge\.llama_guard\.id=own/er: the hub can't be read"):
        guarding(Path("own/er"))


def test_weights_of_another_kind_or_broken_end_in_a_sentence(tmp_path: Path, tiny: Path, guard: Path) -> None:
    with pytest.raises(UserError, match=r"its weights are not all there \(score\.weight\), so it is no classifier"):
        next(moderation(tiny, harmful_labels=["LABEL_1"]).verdicts(PAIRS))
    broken = shutil.copytree(guard, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((guard / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"judge\.llama_guard\.id=.* can't be loaded: "):
        guarding(broken)


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<verdict>"


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, pad_token_id=1))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def guarding(folder: Path, pairs: list[Pair] = PAIRS, **more: Any) -> list[Verdict]:
    settings: dict[str, Any] = {"before": "\n\n", "safe": "safe", "unsafe": "unsafe", "max_length": 4096}
    return list(LlamaGuardJudge(str(folder), None, "float32", **(settings | more)).verdicts(pairs))


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
        assert (verdict.flagged, verdict.cut) == (wanted > 0.5, False)
    turned = guarding(guard, PAIRS, safe="unsafe", unsafe="safe")
    assert [v.score for v in turned] == pytest.approx([1 - v.score for v in verdicts], abs=1e-6)
    assert all(a.flagged != b.flagged for a, b in zip(verdicts, turned, strict=True))


def test_a_long_answer_is_cut_and_the_template_is_not(guard: Path) -> None:
    tokenizer = load_tokenizer(guard)
    pair = PAIRS[3]
    room = 100 - len(tokenizer(f"<user>{pair.prompt}<assistant><verdict>\n\n")["input_ids"])
    short = Pair(pair.prompt, pair.response[:room])
    (whole,), (cut,) = guarding(guard, [short]), guarding(guard, [pair], max_length=100)
    assert cut.cut
    assert cut.score == pytest.approx(whole.score, abs=1e-6)
    with pytest.raises(UserError, match="max_length=20 is too small: template and request alone take"):
        guarding(guard, [pair], max_length=20)


def test_words_that_can_not_be_told_apart_and_models_that_are_no_guards(guard: Path, tiny: Path) -> None:
    with pytest.raises(UserError, match="'safe' and 'sound' begin with the same token"):
        guarding(guard, PAIRS, unsafe="sound")
    with pytest.raises(UserError, match="its tokenizer has no chat template"):
        guarding(tiny, PAIRS)
