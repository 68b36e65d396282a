"""Check a GPU: runs, memory and speed. `make gpu` runs this file and writes benchmarks/results/DEVICE.md."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import pytest
import torch

from benchmarks import gpu
from benchmarks.footprint import SHAPES, Lora, Shape, planned, training_memory
from benchmarks.setting import Result, embedded_model
from helpers.paths import ROOT
from lisa_lightning.config.settings import Lora as LoraSettings
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.model.factors import causal_model
from lisa_lightning.model.lora import attach, load

GPU = ["trainer.accelerator=gpu", "trainer.devices=1", "trainer.precision=bf16-mixed"]
TRUE = "llama2_7b"
TINY = Shape(2, 32, 64, 4, 4, 8, 259)


@pytest.fixture(scope="module")
def device() -> torch.device:
    """Return the first GPU; skip without any."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def results(device: torch.device) -> Iterator[list[Result]]:
    """Yield a list of results, which is written to benchmarks/results afterwards."""
    measured: list[Result] = []
    started = perf_counter()
    yield measured
    gpu.write_results(measured, torch.cuda.get_device_name(device), (perf_counter() - started) / 60)


def command(folder: Path, name: str, *words: str) -> "subprocess.Popen[str]":
    """Start a run on the GPU."""
    env = os.environ | {"WANDB_MODE": "disabled", "LISA_CACHE": str(folder / f"cache-{name.partition('-')[0]}")}
    arguments = [sys.executable, str(ROOT / "run.py"), *GPU, *words, f"hydra.run.dir={name}"]
    return subprocess.Popen(arguments, cwd=folder, env=env, text=True, stderr=subprocess.PIPE)


def finish(process: "subprocess.Popen[str]", status: int = 0) -> None:
    """Wait for a run."""
    _, error = process.communicate(timeout=280)
    assert process.returncode == status, error[-3000:]


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
def test_a_run_that_is_stopped_continues_exactly(tmp_path: Path) -> None:
    words = ("experiment=smoke", "optim.steps=200", "evaluate.every=0", "trainer.deterministic=true")
    finish(command(tmp_path, "whole", *words))
    stopped = command(tmp_path, "stopped", *words)
    deadline = time.monotonic() + 120
    while not (tmp_path / "stopped/checkpoints/finetune.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    finish(stopped, 128 + signal.SIGTERM)
    finish(command(tmp_path, "stopped", *words, "resume=true"))
    adapters = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert adapters[0] == adapters[1]


@pytest.mark.gpu
def test_the_embedded_model_learns(tmp_path: Path, results: list[Result]) -> None:
    words = ("experiment=sst2_lisa", "optim.steps=60", "align.optim.steps=30", "evaluate.every=0")
    started = perf_counter()
    finish(command(tmp_path, "embedded", *words))
    results.append(
        Result("embedded model: 90 steps and 1,200 answers", perf_counter() - started, None, "lower", "s", "one run")
    )
    losses = [float(row["train/loss"]) for row in read_rows(tmp_path / "embedded/curves.csv") if row["train/loss"]]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.gpu
@pytest.mark.parametrize(("storage", "checkpointed"), [("bfloat16", False), ("bfloat16", True), ("nf4", False)])
def test_the_peak_of_a_true_shape_is_that_of_the_formula(
    device: torch.device, results: list[Result], storage: str, checkpointed: bool
) -> None:
    if storage == "nf4":
        pytest.importorskip("bitsandbytes")
    shape, _, _, lora = planned(TRUE)
    lora = Lora(lora.r, lora.targets, dropout=False)
    torch.cuda.empty_cache()
    net = gpu.build_net(shape, storage, lora, device, checkpointed)
    rows = gpu.random_rows(shape.vocabulary)
    step = gpu.our_step(net, rows)
    step()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    peak = torch.cuda.max_memory_allocated(device) / gpu.GIB
    expected = sum(training_memory(shape, lora, gpu.step_size(rows), storage, checkpointed).values()) / gpu.GIB
    name = f"{TRUE}, {storage}{', checkpointed' if checkpointed else ''}"
    results.append(Result(f"{name}: peak of a step", peak, None, "lower", "GiB", f"formula {expected:.2f} GiB"))
    assert peak == pytest.approx(expected, rel=0.1)
    if not checkpointed:
        results.extend(gpu.compare_steps(net, rows, name))
        assert results[-2].met


@pytest.mark.gpu
def test_answers_in_batches_are_faster(device: torch.device, results: list[Result]) -> None:
    shape = SHAPES[TRUE]
    with device:
        model = gpu.model_of(shape).eval()
    prompts = [list(row.ids) for row in gpu.random_rows(shape.vocabulary)] * 4
    results.extend(gpu.compare_answers(model, prompts, 32, TRUE))
    assert results[-2].met


@pytest.mark.gpu
def test_the_embedded_model_trains_faster_than_the_reference(device: torch.device, results: list[Result]) -> None:
    lora = LoraSettings(r=8, alpha=16, dropout=0.0, targets=["q_proj", "v_proj"])
    net = attach(load(embedded_model(), "bfloat16"), lora, 0).to(device)
    results.extend(gpu.compare_steps(net, gpu.random_rows(49152), "embedded model"))
    assert results[-2].met


def test_the_measurements_run_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny shape on the CPU: our step and the reference's descend, and the file has a line for each result."""
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "REPETITIONS", 2)
    cpu, lora, rows = torch.device("cpu"), Lora(4, ("q_proj", "v_proj"), dropout=False), gpu.random_rows(259)
    for checkpointed in (False, True):
        step = gpu.our_step(gpu.build_net(TINY, "bfloat16", lora, cpu, checkpointed), rows)
        first = step()
        assert [step() for _ in range(20)][-1] < first
    assert (
        gpu.step_size(rows).tokens == gpu.PREFIX + gpu.ROWS * gpu.OWN - gpu.ROWS
    )  # the last token of a row predicts nothing
    net = gpu.build_net(TINY, "bfloat16", lora, cpu)
    results = [*gpu.compare_steps(net, rows, "tiny")]
    results += gpu.compare_answers(causal_model(net).eval(), [list(row.ids[:9]) for row in rows], 3, "tiny")
    path = gpu.write_results(results, "NVIDIA H200 (made up)", 1.0)
    assert path.name == "nvidia-h200-made-up.md"
    assert path.read_text().count("\n| tiny: ") == 4
