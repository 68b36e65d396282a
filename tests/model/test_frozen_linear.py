"""The faster products on a CPU are the same products."""

import pytest
import torch
from torch import nn

from lisa_lightning.model import frozen_linear as cpu
from lisa_lightning.model.frozen_linear import use_onednn


@pytest.fixture(autouse=True)
def _not_by_intel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_intel_cpu", lambda: False)


def test_where_the_usual_way_is_faster_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_intel_cpu", lambda: True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    layer = nn.Linear(7, 5).requires_grad_(False)
    use_onednn(layer)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_a_frozen_layer_computes_what_it_did(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(7, 5, bias=bias).requires_grad_(False)
    fast = nn.Linear(7, 5, bias=bias).requires_grad_(False)
    fast.load_state_dict(plain.state_dict())
    use_onednn(fast)
    assert type(fast) is not nn.Linear
    x = torch.randn(shape)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(ours).square().sum().backward()
    plain(theirs).square().sum().backward()
    torch.testing.assert_close(fast(x), plain(x))
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_layers_that_are_trained_or_of_another_precision_are_left_alone() -> None:
    layers = nn.ModuleList([nn.Linear(7, 5), nn.Linear(7, 5, dtype=torch.bfloat16).requires_grad_(False)])
    use_onednn(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, nn.Linear]


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_thawed_learns_again(name: str) -> None:
    layer = nn.Linear(7, 5).requires_grad_(False)
    use_onednn(layer)
    thawed = layer.get_parameter(name).requires_grad_(True)
    layer(torch.randn(3, 7)).sum().backward()
    assert thawed.grad is not None
    assert thawed.grad.abs().sum() > 0


def test_autocast_decides_the_precision_as_ever() -> None:
    layer = nn.Linear(7, 5).requires_grad_(False)
    use_onednn(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 7)).dtype == torch.bfloat16
