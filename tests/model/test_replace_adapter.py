"""A model whose adapter is replaced computes what the factors say, whatever their rank and modules."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from lisa_lightning.config.settings import Lora
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.lora import attach, load, replace_adapter, save_adapter

IDS = torch.arange(9)[None]


def tiny_with_adapter(tiny: Path, targets: list[str] | str = "all-linear") -> tuple[PeftModel, Factors]:
    """Return the tiny model with an adapter whose B is not zero, and the adapter's factors."""
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=6, dropout=0.0, targets=targets), 0)
    factors = {
        name: torch.randn(w.shape, generator=torch.Generator().manual_seed(1)) for name, w in trainable(net).items()
    }
    return replace_adapter(net, factors), factors


def test_factors_of_the_same_shapes_are_set_in_place(tiny: Path) -> None:
    net, factors = tiny_with_adapter(tiny)
    config = net.peft_config["default"]
    same = replace_adapter(net, {name: 2 * value for name, value in factors.items()})
    assert same is net
    assert same.peft_config["default"] is config
    assert all(torch.equal(w, 2 * factors[name]) for name, w in trainable(same).items())


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_factorization_of_other_rank_has_the_same_logits_also_when_saved(
    tiny: Path, tmp_path: Path, targets: list[str] | str
) -> None:
    """B A = [B/2, B/2] [A; A] has twice the rank, and alpha/r stays."""
    net, factors = tiny_with_adapter(tiny, targets)
    net.peft_config["default"].base_model_name_or_path = "its/name"
    before = net(input_ids=IDS).logits
    doubled: Factors = {}
    for a, b in modules(factors).values():
        doubled[a] = torch.cat([factors[a], factors[a]])
        doubled[b] = torch.cat([factors[b], factors[b]], 1) / 2
    replaced = replace_adapter(net, doubled)
    assert replaced.peft_config["default"].base_model_name_or_path == "its/name"
    torch.testing.assert_close(replaced(input_ids=IDS).logits, before, atol=1e-5, rtol=0)
    save_adapter(replaced, str(tiny), tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 12)
    loaded = PeftModel.from_pretrained(load(tiny, "float32"), tmp_path / "saved")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, before, atol=1e-5, rtol=0)


def test_modules_without_factors_lose_their_adapter(tiny: Path) -> None:
    net, factors = tiny_with_adapter(tiny)
    one = {name: value for name, value in factors.items() if ".layers.0.self_attn.q_proj." in name}
    replaced = replace_adapter(net, one)
    assert trainable(replaced).keys() == one.keys()
    assert replaced.training
