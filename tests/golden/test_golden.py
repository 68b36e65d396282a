"""Every method against its official implementation, batch by batch, as recorded in tests/golden."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from golden.case import tiny_net
from golden.replay import GOLDEN, main, replay
from lisa_lightning.model.factors import modules, trainable

CASES = sorted(GOLDEN.glob("*.json"))
QUICK = ("lisa",)  # how names of cases begin


@pytest.mark.parametrize(
    "case",
    [pytest.param(p, id=p.stem, marks=() if p.stem.startswith(QUICK) else pytest.mark.slow) for p in CASES],
)
def test_equals_the_official_run(case: Path) -> None:
    errors = replay(case.with_suffix(""))
    assert errors.passed, errors


@pytest.mark.slow
def test_where_a_case_accumulates_asft_adds_its_penalty_to_every_micro_batch(tmp_path: Path) -> None:
    """Accumulated steps of AsFT equal those of plain autograd, with C of full size.

    An epoch's last step has fewer micro-batches.
    """
    facts = json.loads((GOLDEN / "asft.json").read_text()) | {"gradient_accumulation": 4}
    tensors = load_file(GOLDEN / "asft.safetensors")
    net = tiny_net(facts, tensors).double()
    weights = trainable(net)
    changes = {m: (tensors[f"aligned.{m}.weight"] - tensors[f"base.{m}.weight"]).double() for m in modules(weights)}
    optimizer = torch.optim.AdamW(weights.values(), facts["lr"], facts["betas"], facts["eps"], facts["weight_decay"])
    for i, fact in enumerate(facts["steps"]):
        ids, labels, mask = (tensors[f"step{i:03d}.user.{n}"] for n in ("input_ids", "labels", "attention_mask"))
        logits = net(input_ids=ids, attention_mask=mask).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()) / 4
        for module, (a, b) in modules(weights).items():
            product, v = weights[b] @ weights[a], changes[module]
            loss = loss + facts["lambda_reg"] * (product - v @ v.T / v.norm() @ product).square().sum()
        loss.backward()
        fact["loss"] = loss.item()
        place = i % facts["steps_per_epoch"] + 1
        if place % 4 == 0 or place == facts["steps_per_epoch"]:
            optimizer.step()
            optimizer.zero_grad()
        if place == facts["steps_per_epoch"]:
            optimizer.param_groups[0]["lr"] *= facts["gamma"]
    given = {name: t for name, t in tensors.items() if not name.startswith(("before", "final."))}
    save_file(given | {f"final.{n}": w.detach() for n, w in weights.items()}, tmp_path / "asft_4.safetensors")
    (tmp_path / "asft_4.json").write_text(json.dumps(facts))
    errors = replay(tmp_path / "asft_4")
    assert errors.passed, errors


def test_a_case_that_fails_or_breaks_does_not_hide_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads((GOLDEN / "constrained_sft.json").read_text())
    tensors = load_file(GOLDEN / "constrained_sft.safetensors")
    for name, change in (("broken", {"method": "none"}), ("off", {"loss": facts["loss"] + 1e-4}), ("good", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | change))
        save_file(tensors, tmp_path / f"{name}.safetensors")
    assert main([str(tmp_path / name) for name in ("broken", "off", "good")]) == 1
    assert [line.partition("FAILED")[1] for line in capsys.readouterr().out.splitlines()] == ["FAILED", "FAILED", ""]
