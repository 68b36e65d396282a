"""Common behaviour of the judges that are models: sources of weights and tokenizer, and refused models."""

import json
import shutil
from io import BytesIO
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from helpers.judge_models import PAIRS, TEXT, guarding, moderation
from lisa_lightning.runtime.errors import UserError


def test_what_is_no_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.moderation\.id=/no/such: there is no such folder"):
        moderation(Path("/no/such"))
    with pytest.raises(UserError, match=r"judge\.moderation\.text=.*: a placeholder is missing"):
        moderation(Path(), text="{prompt}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    for make in (lambda: moderation(tmp_path, revision="main"), lambda: guarding(tmp_path)):
        with pytest.raises(UserError, match=r"judge\.[a-z_]+\.id=.*: no \*\.safetensors in it, and pickled weights"):
            make()
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="no tokenizer in it, which is one of"):
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
    def fetched(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert not any(pattern in ("*", "*.py", "*.bin") for pattern in allow_patterns)
        if revision is None:
            raise OSError("no route")
        return str(shutil.copytree(classifier, tmp_path / f"commit-{revision}", dirs_exist_ok=True))

    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    versions = {moderation(Path("own/er"), revision=r).version for r in ("a", "b", "a")}
    assert (asked, len(versions)) == ([("own/er", r) for r in ("a", "b", "a")], 2)
    with pytest.raises(UserError, match=r"judge\.moderation\.id=own/er: the hub can't be read \(no route\)"):
        moderation(Path("own/er"))
    with pytest.raises(UserError, match=r"judge\.llama_guard\.id=own/er: the hub can't be read \(no route\)"):
        guarding(Path("own/er"))


def test_weights_of_another_kind_or_broken_end_in_a_sentence(tmp_path: Path, tiny: Path, guard: Path) -> None:
    with pytest.raises(UserError, match=r"some of its weights are missing \(score\.weight\)"):
        next(moderation(tiny, harmful_labels=["LABEL_1"]).verdicts(PAIRS))
    broken = shutil.copytree(guard, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((guard / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"judge\.llama_guard\.id=.* can't be loaded: "):
        guarding(broken)
