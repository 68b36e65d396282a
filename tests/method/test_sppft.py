"""SPPFT: which layers it freezes, and that it is plain training of the other layers alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers import training
from helpers.training import Train, weights
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.sppft import SPPFT
from lisa_lightning.model.lora import attach
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.runtime.errors import UserError


@pytest.mark.parametrize(
    ("layers", "begin", "end", "frozen"),
    [
        (32, 4, 15, range(5, 15)),
        (32, None, None, range(5, 15)),
        (30, None, None, range(5, 14)),
        (42, None, None, range(6, 20)),
        (2, None, None, range(1, 2)),
        (4, None, None, range(1, 2)),
        (30, 20, None, range(21, 22)),
        (30, None, 30, range(5, 30)),
    ],
)
def test_both_ends_train(layers: int, begin: int | None, end: int | None, frozen: range) -> None:
    assert SPPFT(begin, end).frozen_layers(layers) == frozen


@pytest.mark.parametrize(
    ("layers", "begin", "end", "message"),
    [
        (2, 4, 15, r"method\.begin=4: no layer .* the model has 2, from 0\. Fix: method\.begin=0 or less"),
        (8, 4, 15, r"method\.end=15: the model has 8 layers\. Fix: method\.end=8 or less"),
        (32, 4, 5, r"method\.end=5: no layer is between method\.begin=4 and it, .* Fix: method\.end=6 or more"),
        (32, 15, 4, r"method\.end=4: .* Fix: method\.end=17 or more"),
        (32, None, 3, r"method\.end=3: .* method\.begin=4 .* Fix: method\.end=6 or more"),
        (32, 31, None, r"Fix: method\.begin=30 or less"),
    ],
)
def test_a_range_that_freezes_nothing_is_refused(layers: int, begin: int | None, end: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SPPFT(begin, end).frozen_layers(layers)


@pytest.mark.parametrize("layer", [0, 1])
def test_adapters_in_frozen_layers_alone_or_in_none_are_refused(
    train: Train, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    def attach_to_one(model: Any, lora: Any, seed: int) -> Any:
        net = attach(model, lora, seed)
        for name, weight in net.named_parameters():
            weight.requires_grad_(weight.requires_grad and f".layers.{layer}." in name)
        return net

    monkeypatch.setattr(training, "attach", attach_to_one)
    with pytest.raises(UserError, match=("no adapter is", "all adapters are")[layer] + " in the layers 1 to 1, which"):
        train(SPPFT(0, 2), steps=1)


def test_it_is_sft_of_the_other_layers_bit_for_bit(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen adapters count neither in the clipped norm nor in the decay, and the backward pass leaves them out."""
    trained = partial(train, dropout=0.2, steps=6, batch_size=2, accumulate=2, clip=0.05, weight_decay=0.1)
    inputs: list[int] = []
    differentiate = Backprop.differentiate

    def counting(self: Backprop, loss: Tensor, of: Sequence[Tensor], allow_unused: bool = False) -> Any:
        inputs.append(len(of))
        return differentiate(self, loss, of, allow_unused)

    with patch.object(Backprop, "differentiate", counting):
        frozen = weights(trained(SPPFT(0, 2), folder="sppft"))
    assert set(inputs) == {len(frozen) // 2}

    initial: dict[str, Tensor] = {}

    def attach_frozen(model: Any, lora: Any, seed: int) -> Any:
        net = attach(model, lora, seed)
        for name, weight in net.named_parameters():
            if weight.requires_grad and ".layers.1." in name:
                initial[name] = weight.detach().clone()
                weight.requires_grad_(False)
        return net

    monkeypatch.setattr(training, "attach", attach_frozen)
    expected = weights(trained(SFT(), folder="sft")) | initial
    assert frozen.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in frozen.items())
