"""A sharded model on two ranks: what a whole one gives on them, bit for bit, and what it can't do."""

import json
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from helpers import sharded as helper
from helpers.forking import Forked
from helpers.training import weights
from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.resume_curves import ResumeCurves
from lisa_lightning.config.settings import ModelSettings
from lisa_lightning.model.lora import load
from lisa_lightning.pipeline.api import compose_request
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.pipeline.run import run
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.runtime.errors import UserError

STAGES = [
    *("curate=seal", "curate.epochs=1", "source.alignment.take=24", "align=repnoise", "method=lisa"),
    *(
        "repair=safe_lora",
        "repair.number=2",
        "optim.steps=8",
        "align.optim.steps=3",
        "evaluate.every=4",
        "lora.dropout=0.1",
    ),
]
COMMON = {"MASTER_ADDR": "127.0.0.1", "WANDB_MODE": "disabled"}


@pytest.fixture(scope="module")
def results(tiny: Path, tmp_path_factory: pytest.TempPathFactory, forked: Forked) -> dict[str, Any]:
    """Return what tests/helpers/sharded.py wrote, and its folder."""
    out = tmp_path_factory.mktemp("sharded")
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        forked.start([str(tiny), str(out)], out, COMMON | port | {"LOCAL_RANK": str(rank)}, "helpers.sharded")
        for rank in range(2)
    ]
    for done in map(forked.wait, ranks):
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out / "results.pt", weights_only=True) | {"folder": out}


@pytest.mark.slow
def test_training_and_its_resumption_equal_those_of_a_whole_model(results: dict[str, Any]) -> None:
    trained = results["weights"]
    for name in ("sharded", "resumed"):
        assert all(torch.equal(a, b) for a, b in zip(trained["ddp"], trained[name], strict=True)), name
    whole, sharded = (results["folder"] / f"{name}.ckpt" for name in ("ddp", "sharded"))
    assert sharded.stat().st_size == pytest.approx(whole.stat().st_size, rel=0.01)  # adapters alone


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_goes_on_with_one(results: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """One rank with twice the batch size draws the same rows."""
    module = helper.make_module(ModelSource(Model(tiny), ModelSettings(dtype="float32")), 4)
    checkpoint = tmp_path / "kept.ckpt"
    checkpoint.write_bytes((results["folder"] / "kept.ckpt").read_bytes())
    resume = ResumeCurves(None, "finetune")
    trainer = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    fit(module, helper.make_data(tiny), trainer, Checkpoint(checkpoint, every=3), [resume], [], "finetune")
    expected = results["weights"]["sharded"]
    torch.testing.assert_close(list(weights(module).values()), expected, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_answers_are_those_of_the_merged_model_and_each_rank_holds_half_of_its_layers(
    results: dict[str, Any], tiny: Path
) -> None:
    assert len(results["texts"]["ddp"]) == 6
    assert results["texts"]["sharded"] == results["texts"]["ddp"]
    assert torch.equal(*results["logits"])
    model = load(tiny, "float32")
    in_layers = sum(w.nbytes for w in model.model.layers.parameters() if w.ndim > 1)
    assert results["bytes"]["ddp"] - results["bytes"]["sharded"] == in_layers // 2
    net = PeftModel.from_pretrained(model, results["folder"] / "adapter")
    saved = load_file(results["folder"] / "adapter" / "adapter_model.safetensors")
    assert len(saved) == sum("lora_" in name for name, _ in net.named_parameters())


@pytest.mark.slow
def test_a_run_equals_that_of_a_whole_model_and_shares_its_cache(tmp_path: Path, forked: Forked) -> None:
    def command(name: str, cache: str, *overrides: str) -> Path:
        arguments = ["experiment=smoke", f"hydra.run.dir={name}", *STAGES, *overrides]
        done = forked.run_ranks(arguments, tmp_path, COMMON | {"LISA_CACHE": str(tmp_path / cache)})
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    sharded = ("trainer=sharded", "trainer.devices=2")
    whole, other = command("whole", "cache", "trainer=ddp"), command("sharded", "other", *sharded)
    for name in ("adapter/adapter_model.safetensors", "responses.jsonl", "judged.jsonl"):
        assert (whole / name).read_bytes() == (other / name).read_bytes(), name
    (merged,), (again,) = (sorted((tmp_path / c / "align").glob("*/model.safetensors")) for c in ("cache", "other"))
    assert merged.read_bytes() == again.read_bytes()
    assert merged.parent.name == again.parent.name
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (whole, command("again", "cache", *sharded))]
    assert metrics[0]["time/finetune_s"] == metrics[1]["time/finetune_s"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("trainer.devices=1", "there is one process, and nothing to shard over. Fix: trainer.devices=2 or more"),
        ("repair=antidote", "repair=antidote runs the whole model on one rank. Fix: leave it out"),
        ("repair=nlsr", "repair=nlsr runs the whole model on one rank"),
        ("method=spag method.safe_ratio=0.5", "method=spag runs the whole model on one rank"),
        ("evaluate.kl_rows=2", "evaluate.kl_rows runs the whole model on one rank"),
        ("attack=abliterate method=sft", "attack=abliterate runs the whole model on one rank"),
        ("attack=benign_outlier", "attack=benign_outlier runs the whole model on one rank"),
        ("lora=null method=sft", "lora=null trains the weights that would be sharded. Fix: leave lora=null out"),
        ("model.quantize=nf4", "4-bit weights .model.quantize. can't be sharded. Fix: model.quantize=null"),
    ],
)
def test_what_a_sharded_model_cannot_do_is_refused_before_it_loads(
    tmp_path: Path, overrides: str, message: str
) -> None:
    words = ["experiment=smoke", "trainer=sharded", "trainer.devices=2", "trainer.accelerator=cpu", *overrides.split()]
    with pytest.raises(UserError, match=f"^trainer.shard=true: {message}"):
        run(compose_request(words, tmp_path / "out"))
