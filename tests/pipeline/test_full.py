"""Runs of full-parameter fine-tuning: which methods train all weights, the files of a run, and its export."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.composing import composed
from helpers.methods import each
from helpers.paths import ROOT
from lisa_lightning import export
from lisa_lightning.config.validate import check
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError

SHORT = ("experiment=smoke", "lora=null", "align.optim.steps=2", "optim.steps=4", "evaluate.every=0")
METHODS = sorted(file.stem for file in (ROOT / "conf" / "method").glob("[!_]*.yaml"))
REPAIRS = sorted({file.stem for file in (ROOT / "conf" / "repair").glob("[!_]*.yaml")} - {"none"})
NEED_ADAPTER = ("asft", "salora")
REFUSED = {
    "method=asft": r"^method=asft: works on the factors of a LoRA adapter.* trains all weights\. Fix: .*lisa",
    "method=salora": r"^method=salora: works on the factors of a LoRA adapter",
    "model.adapters=continued": r"^lora=null: model\.adapters=continued .* Fix: model\.adapters=stacked",
    "model.quantize=nf4": r"^lora=null: weights that are quantized .* Fix: model\.quantize=null",
    "adapter=folder": r"^lora=null: adapter=folder is an adapter, and nothing is fine-tuned\. Fix: leave lora out",
    "lora.r=4": r"^lora=null lora\.r=4: the first trains all weights, and the second is of an adapter\. Fix: leave one",
    "method=sppft method.end=15": r"^method\.end=15: the model has 2 layers",
    **{
        f"repair={name}": rf"^repair={name}: repairs a LoRA adapter, and lora=null trains all weights"
        for name in REPAIRS
    },
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder with the cache of all runs, and a finished run under Lisa in it."""
    folder = tmp_path_factory.mktemp("full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        run(composed([*SHORT, f"cache_dir={folder / 'cache'}"], folder / "run"))
        yield folder


@pytest.mark.parametrize("words", REFUSED)
def test_what_needs_an_adapter_is_refused_before_a_model_loads(tmp_path: Path, words: str) -> None:
    with pytest.raises(UserError, match=REFUSED[words]):
        run(composed([*SHORT, *words.split(), f"cache_dir={tmp_path / 'cache'}"], tmp_path / "out"))
    assert {folder.name for folder in (tmp_path / "cache").glob("*")} <= {"models"}


def test_without_fine_tuning_null_changes_nothing(tmp_path: Path) -> None:
    check(composed([*SHORT, "stages=[align]", "model.adapters=continued"], tmp_path).cfg)


@pytest.mark.parametrize("name", each(sorted(set(METHODS) - {*NEED_ADAPTER}), ("sft",)))
def test_every_other_method_trains_all_weights(work: Path, tmp_path: Path, name: str) -> None:
    words = [*SHORT, f"method={name}", "stages=[align,finetune]", f"cache_dir={work / 'cache'}"]
    metrics = run(composed(words, tmp_path / "run"))
    assert metrics["train/steps"] == 4
    assert not (tmp_path / "run" / "adapter").exists()
    tuned, aligned = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (tmp_path / "run" / "model", next((work / "cache" / "align").glob("*/config.json")).parent)
    )
    layers = zip(tuned.named_parameters(), aligned.parameters(), strict=True)
    same = {name for (name, one), other in layers if torch.equal(one, other)}
    # SPPFT freezes a layer.
    assert len(same) < len(list(tuned.parameters())) / 2 if name == "sppft" else not same


def logits(folder: Path) -> torch.Tensor:
    batch = AutoTokenizer.from_pretrained(folder)("Is the tea hot?", return_tensors="pt")
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(**batch).logits


def test_the_exported_model_is_that_of_the_run(work: Path, tmp_path: Path) -> None:
    out = export(work / "run", tmp_path / "exported")
    assert torch.equal(logits(out), logits(work / "run" / "model"))
    (aligned,) = (folder for folder in (work / "cache" / "align").iterdir() if folder.is_dir())
    assert (logits(out) - logits(aligned)).abs().max() > 1e-3
    card = (out / "README.md").read_text()
    assert "- full-parameter" in card
    assert "- lora" not in card
    assert "Full-parameter fine-tuning trained all its weights" in card
    assert "lisa on sst2 (full-parameter)" in (work / "run" / "report.html").read_text()


def test_a_run_has_the_weights_of_the_cache_without_their_space(work: Path) -> None:
    model = work / "run" / "model"
    stages = [file.parent for file in (work / "cache" / "finetune").glob("*/model.safetensors")]
    (stage,) = (stage for stage in stages if (stage / "model.safetensors").samefile(model / "model.safetensors"))
    for name in ("config.json", "tokenizer.json"):
        assert not (model / name).samefile(stage / name)


def test_a_changed_or_linked_model_is_not_exported(work: Path, tmp_path: Path) -> None:
    copy, model = tmp_path / "run", work / "run" / "model"
    for file in (work / "run").rglob("*"):
        if file.is_file():
            (copy / file.relative_to(work / "run")).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(work / "run")).write_bytes(file.read_bytes())
    config = copy / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match=r"config\.json has changed since the run"):
        export(copy, tmp_path / "exported")
    (copy / "model" / "checksums.json").unlink()
    config.unlink()
    config.symlink_to(model / "config.json")
    with pytest.raises(UserError, match="or a link in it"):
        export(copy, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
