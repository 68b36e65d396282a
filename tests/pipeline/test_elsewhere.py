"""Runs on a device other than the CPU: everything is where it has to be, and the numbers are the CPU's, bit for bit."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.composing import composed
from helpers.elsewhere import There, elsewhere
from helpers.methods import METHODS
from helpers.training import Train, weights
from lisa_lightning.method.base import Method
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.model import frozen_linear as cpu
from lisa_lightning.pipeline.run import run

pytestmark = pytest.mark.slow
RUNS = {
    "seal, t_vaccine, asft, antidote": [
        *("curate=seal", "align=t_vaccine", "align.method.active_layers=1", "method=asft", "repair=antidote"),
        *("source.alignment.take=8", "source.defender.take=8"),
    ],
    "pharmacist, booster, ewc, safe_lora": [
        *("curate=pharmacist", "align=booster", "align.method.rho=5", "method=ewc", "repair=safe_lora"),
        *("repair.number=2", "source.alignment.take=8", "source.defender.take=8"),
        *("curate.validation_rows=2", "curate.warmup_steps=2"),
    ],
    "lox, task_arithmetic": ["align=lox", "repair=task_arithmetic", "repair.drop_rate=0.3", "repair.random=true"],
    "spag, safe_merge": ["method=spag", "method.safe_ratio=0.2", "repair=safe_merge", "repair.threshold=1"],
    "salora, task_arithmetic": ["method=salora", "method.safety_rank=4", "repair=task_arithmetic"],
    "tar": ["align=tar", "align.method.switch_share=1", "source.alignment.take=8", "source.defender.take=8"],
    "repnoise, ldifs, nlsr": ["align=repnoise", "method=ldifs", "repair=nlsr", "source.alignment.take=40"],
}
WITH_STATE = (
    *("lisa", "ewc_carrying_over", "ldifs", "kl", "constrained_sft", "sbr", "t_vaccine", "booster_adding_back"),
    "repnoise",
    *("salora", "spag", "safegrad"),
)
"""Methods with tensors that a checkpoint moves to the device."""


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let frozen layers multiply by torch, as on the other device, since oneDNN on a CPU rounds differently."""
    monkeypatch.setattr(cpu, "is_intel_cpu", lambda: True)


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_run_elsewhere_is_a_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("lisa_lightning.pipeline.run_folder.write_page", lambda *_: [])

    def ran(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        out = tmp_path / name
        small = ["optim.steps=4", "evaluate.every=4", "evaluate.gradient_rows=2"]
        small += ["curate.epochs=1"] if "curate" in words[0] else []
        request = composed(
            ["experiment=smoke", "model.attention=eager", f"cache_dir={tmp_path / name}-cache", *small, *words], out
        )
        metrics = run(request)
        scores = {k: v for k, v in metrics.items() if not k.startswith(("time/", "memory/"))}
        return scores, load_file(out / "adapter" / "adapter_model.safetensors")

    scores, adapter = ran("here")
    with elsewhere():
        others, other = ran("there")
    assert scores == others
    assert all(torch.equal(w, other[name]) for name, w in adapter.items())


@pytest.mark.parametrize("name", WITH_STATE)
def test_training_elsewhere_goes_on_from_a_checkpoint(train: Train, name: str) -> None:
    def method() -> Method:
        return Lisa(2, 1, 1.0, 0.0) if name == "lisa" else METHODS[name]()

    train = partial(train, steps=5, attention="eager")  # of others there may be another kernel
    straight = weights(train(method(), folder="here"))
    with elsewhere():
        with pytest.raises(InterruptedError):
            train(method(), folder="there", stop_after=4)
        resumed = train(method(), folder="there")
        assert all(isinstance(t, There) for t in resumed.state["anchor"])
    for weight, other in zip(straight.values(), weights(resumed).values(), strict=True):
        assert torch.equal(weight, other)  # Lightning has moved the model back
