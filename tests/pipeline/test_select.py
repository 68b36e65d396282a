"""Stage `select`: embeddings against the model's own passes, and runs with all rows, with some, and from the cache."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.composing import composed
from lisa_lightning.data.dpp import DPP
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.pipeline.run import run
from lisa_lightning.pipeline.stages.select import prompt_embeddings

ROWS = [Row("word " * (7 * i % 5) + f"{i}", "context" * (i % 2), "answer") for i in range(11)]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_an_embedding_is_the_mean_of_the_last_states_of_the_prompt_alone(tiny: Path, batch_size: int) -> None:
    """Any batch size gives the mean that one prompt at a time has, in the order of the rows."""
    model, tokenizer = load(tiny, "float32").eval(), load_tokenizer(tiny)

    def alone(text: str) -> Tensor:
        ids = torch.tensor([tokenizer(text)["input_ids"][:20]])
        with torch.no_grad():
            return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0].mean(0)

    expected = torch.stack([alone(f"{r.instruction} {r.context}" if r.context else r.instruction) for r in ROWS])
    embedded = prompt_embeddings(model, Encoder(tokenizer, "alpaca", 20), ROWS, batch_size)
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=0)


def test_an_empty_prompt_has_an_embedding(tiny: Path) -> None:
    rows = [Row("", "", "answer"), Row("a", "", "answer")]
    encoder = Encoder(load_tokenizer(tiny), "alpaca", 20)
    assert prompt_embeddings(load(tiny, "float32").eval(), encoder, rows, 2).isfinite().all()


@pytest.mark.slow
def test_a_run_trains_on_the_selected_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run trains on the selected rows, and on all of them if it selects as many as there are.

    A run with another threshold finds the selection in the cache.
    """
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("lisa_lightning.pipeline.run_folder.write_page", lambda *_: [])
    selections: list[list[int]] = []
    select = DPP.select

    def heard(dpp: DPP, candidates: Tensor, references: Tensor) -> list[int]:
        assert (len(candidates), len(references)) == (12, 60)
        selections.append(select(dpp, candidates, references))
        return selections[-1]

    monkeypatch.setattr(DPP, "select", heard)

    def ran(name: str, *words: str) -> tuple[Metrics, dict[str, Tensor]]:
        small = ["optim.steps=4", "stages=[align,finetune]", "evaluate.every=0", "source.alignment.take=12"]
        small += ["method=spag", "method.tau=0", f"cache_dir={tmp_path}/cache"]
        metrics = run(composed(["experiment=smoke", *small, *words], tmp_path / name))
        return metrics, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    metrics, one = ran("one", "method.safe_ratio=0.1")
    assert metrics["rows/selected"] == len(selections[-1]) == 6
    assert metrics["time/select_s"] > 0
    (file,) = tmp_path.glob("cache/select/*/rows.json")
    assert json.loads(file.read_text())["rows"] == selections[-1]
    assert ran("again", "method.safe_ratio=0.1", "method.tau=0.5")[0]["rows/selected"] == 6
    assert len(selections) == 1
    every, whole = ran("every", "method.safe_ratio=1.0")
    assert every["rows/selected"] == 12
    without, plain = ran("without", "method.safe_ratio=null")
    assert "rows/selected" not in without
    assert all(torch.equal(weight, plain[name]) for name, weight in whole.items())
    assert any(not torch.equal(weight, plain[name]) for name, weight in one.items())
    assert len(selections) == 2


@pytest.mark.slow
def test_a_continued_adapter_takes_part_in_the_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embeddings are the aligned model's, whether its adapter is merged or continued."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("lisa_lightning.pipeline.run_folder.write_page", lambda *_: [])
    embeddings: dict[str, Tensor] = {}
    small = ["optim.steps=2", "stages=[align,finetune]", "evaluate.every=0", "source.alignment.take=12", "method=spag"]
    small += ["align.optim.lr=0.05", f"cache_dir={tmp_path}/cache"]
    for name, words in {
        "stacked": ["model.adapters=stacked"],
        "continued": ["model.adapters=continued"],
        "base": ["align=none"],
    }.items():
        monkeypatch.setattr(DPP, "select", lambda _, found, __, name=name: embeddings.update({name: found}) or [0])
        run(composed(["experiment=smoke", *small, *words], tmp_path / name))
    torch.testing.assert_close(embeddings["continued"], embeddings["stacked"], atol=1e-4, rtol=0)
    assert (embeddings["base"] - embeddings["stacked"]).abs().max() > 1e-2
