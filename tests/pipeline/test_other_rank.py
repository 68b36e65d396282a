"""Adapters that a stage changes after training: saved, loaded, counted and evaluated, also with another rank."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file
from torch import Tensor

from helpers.composing import composed
from lisa_lightning.align.lox import LoX
from lisa_lightning.config.settings import Lora, ModelSettings
from lisa_lightning.engine.transformers import TransformersEngine
from lisa_lightning.evaluation.evaluator import Evaluator, Question
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.lora import attach, attach_saved, load, load_tokenizer, save_adapter, save_merged
from lisa_lightning.pipeline.adapter_folder import read_adapter
from lisa_lightning.pipeline.run import run
from lisa_lightning.pipeline.stages.evaluate import evaluate
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.repair import repair
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.repair.task_arithmetic import TaskArithmetic
from lisa_lightning.runtime.ranks import OneRank

IDS = torch.arange(9)[None]
ALIGN = Lora(r=3, alpha=5, dropout=0.0, targets=["q_proj", "up_proj"])
TUNE = Lora(r=4, alpha=6, dropout=0.0, targets=["q_proj", "v_proj"])


def random_adapter(model: Path, lora: Lora, seed: int) -> tuple[Any, Factors]:
    """Return a model with a random adapter, and a copy of its factors."""
    net = attach(load(model, "float32"), lora, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(net).values():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return net, {name: w.detach().clone() for name, w in trainable(net).items()}


def updates(factors: Factors, lora: Lora) -> dict[str, Tensor]:
    return {m: lora.alpha / lora.r * factors[b] @ factors[a] for m, (a, b) in modules(factors).items()}


def test_an_adapter_repaired_to_another_rank_is_saved_loaded_and_evaluated(tiny: Path, tmp_path: Path) -> None:
    aligned, tuned = Model(tmp_path / "aligned"), Model(tmp_path / "aligned", tmp_path / "tuned" / "adapter")
    net, alignment = random_adapter(tiny, ALIGN, 1)
    save_adapter(net, str(tiny), aligned.folder / "adapter")
    save_merged(net, load_tokenizer(tiny), aligned.folder)
    net, factors = random_adapter(aligned.folder, TUNE, 2)
    save_adapter(net, str(aligned.folder), tmp_path / "tuned" / "adapter")
    models = ModelSource(Model(tiny), ModelSettings(dtype="float32"))
    fabric = Fabric(accelerator="cpu", devices=1)
    cache = StageCache(tmp_path / "cache", {}, fabric, OneRank(), None)

    def repaired() -> tuple[Model, dict[str, Any]]:
        rows: Any = {"alignment": [], "defender": []}
        encoder: Any = None
        return repair(cache, models, encoder, fabric, aligned, tuned, TaskArithmetic(0.5), rows, 4, None)

    final, metrics = repaired()
    assert repaired() == (final, metrics)  # from the cache
    assert final.adapter is not None
    config = json.loads((final.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 10.5)
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "up_proj", "v_proj"}

    both = modules(factors) | modules(alignment)
    assert metrics["repair/modules"] == len(modules(alignment)) < len(both)
    saved = load_file(final.adapter / "adapter_model.safetensors")
    entries = sum(w.numel() for w in saved.values())
    assert len(saved) == 2 * len(both)
    assert metrics["repair/entries"] == sum(w.numel() for w in alignment.values()) / entries

    dense: Any = load(aligned.folder, "float32")
    with torch.no_grad():
        for update, factor in ((updates(factors, TUNE), 1.0), (updates(alignment, ALIGN), 0.5)):
            for module, value in update.items():
                dense.get_submodule(module).weight += factor * value
        expected = dense(input_ids=IDS).logits
    loaded = attach_saved(models.load(final), final.adapter)
    torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, atol=1e-4, rtol=0)
    evaluator = Evaluator(fabric, load_tokenizer(tiny), Prompting("alpaca"), {"harmful": 3}, 2)
    questions = [Question("harmful", f"request {i}", "") for i in range(2)]
    path, engine = tmp_path / "responses.jsonl", TransformersEngine()
    load_final = partial(models.serve, final, fabric.device)
    answers, _ = evaluate(cache, models, evaluator, engine, "final", final, load_final, questions, path)
    assert [a.response for a in answers] == [a.response for a in evaluator.answers(dense, questions, "final")]


@pytest.mark.slow
def test_safe_merge_trains_its_safe_adapter_by_sft_alone_without_defender_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small = [
        *("experiment=smoke", "repair=safe_merge", "repair.threshold=1", "method=sft", "optim.steps=2"),
        *("align.optim.steps=2", "evaluate.every=0", "stages=[align,finetune,repair]"),
        f"cache_dir={tmp_path / 'cache'}",
    ]
    metrics = run(composed(small, tmp_path / "run"))
    assert metrics["repair/modules"] == 4  # q_proj and v_proj of two layers
    assert metrics["time/reference_s"] > 0
    adapter = read_adapter(tmp_path / "run")
    assert (adapter.r, adapter.alpha) == (16, 32)
    assert not list(tmp_path.rglob("reference_dpo*"))
    run(composed([*small, "source.defender.take=3"], tmp_path / "again"))
    assert len(list((tmp_path / "cache" / "reference").glob("*/stage.json"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["stacked", "continued"])
def test_lox_saves_the_adapter_of_sft_with_an_amplified_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    saved = {}
    for align in ("sft", "lox"):
        cache = tmp_path / align
        small = [
            *("experiment=smoke", f"align={align}", "align.optim.steps=2", f"model.adapters={adapters}", "method=sft"),
            *("optim.steps=1", "evaluate.every=0", "stages=[align,finetune]", f"cache_dir={cache}"),
        ]
        run(composed(small, tmp_path / f"run {align}"))
        (saved[align],) = (cache / "align").glob("*/adapter")
    plain, amplified = (load_file(saved[align] / "adapter_model.safetensors") for align in ("sft", "lox"))
    expected = LoX(6, 1.25).finish(plain, {})
    assert all(torch.equal(amplified[name], value) for name, value in expected.items())
    assert any(not torch.equal(plain[name], value) for name, value in expected.items())
