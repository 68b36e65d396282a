"""Sources of models and judges: folders and hub ids are told apart, and their code is never run."""

import errno
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from helpers.judge_models import guarding, moderation
from lisa_lightning.data.hub import read_hub
from lisa_lightning.data.reading import Reading
from lisa_lightning.model.base_model import base_model, locate_weights
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.runtime.cache import build_once, short_hash
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.hub import local_folder
from lisa_lightning.runtime.ranks import OneRank, on_rank_zero


def test_a_folder_is_one_that_is_there_and_a_hub_id_has_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Callable[..., DictConfig]
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("mine", "./mine", "~/mine", str(tmp_path / "mine")):
        assert local_folder("key", name) == tmp_path / "mine"
    assert local_folder("key", "owner/name") is None
    neither = "there is no such folder, and it is not a hub id such as owner/name"
    for name in ("before", "./before", "~/before", "/before", "a/b/c"):
        with pytest.raises(UserError, match=f"^key: {neither}$"):
            local_folder("key", name)
    missing = config("model=smollm2_135m", "model.id=before").model
    with pytest.raises(UserError, match=f"^model.id=before: {neither}$"):
        base_model(OneRank(), missing, tmp_path)
    with pytest.raises(UserError, match=f"^judge.moderation.id=before: {neither}$"):
        moderation(Path("before"))
    with pytest.raises(UserError, match=f"^before train: {neither}$"):
        read_hub("before", None, "train", None, None, None, Reading({}), dict)


@pytest.mark.slow
def test_a_base_model_of_ones_own_is_its_folder_and_what_lies_in_it(
    tmp_path: Path, tiny: Path, config: Callable[..., DictConfig]
) -> None:
    def key(name: str) -> str:
        return base_model(OneRank(), config("model=tiny", f"model.id={tmp_path / name}").model, tmp_path)[1]

    for name in ("a", "b"):
        shutil.copytree(tiny, tmp_path / name)  # with its files' times
    first = key("a")
    assert key("a") == first != key("b")
    (tmp_path / "a" / "config.json").write_text((tiny / "config.json").read_text() + "\n")
    assert key("a") != first


def test_code_that_a_model_brings_is_refused_in_a_sentence_and_not_run(
    tmp_path: Path, guard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code of a model, a judge or a tokenizer is refused, even where a user would agree to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, trace = shutil.copytree(guard, tmp_path / "model"), tmp_path / "trace"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    kinds = ("Config", "ModelForCausalLM", "ModelForSequenceClassification")
    brought = {f"Auto{kind}": f"own.{kind}" for kind in kinds}
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"model_type": "own", "auto_map": brought}))
    refused(partial(load, folder, "float32"), partial(moderation, folder), partial(guarding, folder))
    shutil.copy(guard / "config.json", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(partial(load_tokenizer, folder), partial(moderation, folder), partial(guarding, folder))
    assert not trace.exists()


def refused(*uses: Callable[[], Any]) -> None:
    for use in uses:
        with pytest.raises(
            UserError, match=r"can't be loaded: it needs custom code, which is never run. Fix: use a model"
        ):
            use()


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path, guard: Path) -> None:
    folder = shutil.copytree(guard, tmp_path / "model")
    kept = load_file(folder / "model.safetensors")
    renamed = {f"module.{k}" if "layers.1" in k else k: w for k, w in kept.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    for use in (partial(load, folder, "float32"), partial(guarding, folder)):
        with pytest.raises(UserError, match=r"some of its weights are missing \(model\.layers\.1\."):
            use()


def test_a_part_of_the_weights_that_is_missing_is_named(tmp_path: Path, tiny: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    named = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(named))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"model\.id=.*names model-00002-of-00002\.safetensors, which is not in it"):
        locate_weights(f"model.id={folder}", str(folder), None)


def test_what_another_machine_made_meanwhile_is_taken(tmp_path: Path) -> None:
    """A result that another machine made meanwhile is taken, as on file systems whose locks hold for one machine."""

    def make(folder: Path) -> None:
        (tmp_path / short_hash({}) / "theirs").mkdir(parents=True)

    assert (build_once(OneRank(), tmp_path, {}, make) / "theirs").exists()
    assert not list(tmp_path.glob("*.part-*"))


def test_what_stops_the_first_rank_stops_all() -> None:
    def full() -> None:
        raise UserError("full")

    told: list[Any] = []
    first: Any = SimpleNamespace(is_global_zero=True, broadcast=lambda x: told.append(x) or x)
    other: Any = SimpleNamespace(is_global_zero=False, broadcast=lambda _: told[-1])
    assert [on_rank_zero(rank, lambda: 7) for rank in (first, other)] == [7, 7]
    for rank in (first, other):
        with pytest.raises(UserError, match="full"):
            on_rank_zero(rank, full)
    assert told == [(7, None), (None, "full")]


def test_what_could_not_be_made_whole_is_not_kept(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, "")

    with pytest.raises(UserError, match="can't be written: No space left on device"):
        build_once(OneRank(), tmp_path, {}, full)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=r"without locks \(No locks available\).*another one as cache_dir"):
        build_once(OneRank(), tmp_path, {}, lambda folder: None)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


def test_a_cache_key_is_the_same_in_any_order() -> None:
    key, reordered = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
    assert short_hash(key) == short_hash(reordered) != short_hash({"a": 1})
