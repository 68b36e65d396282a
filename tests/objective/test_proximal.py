"""The proximal term: closed forms, the official trainer's trace on two quadratics, autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.method.base import move_anchor
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.objective.proximal import add_gradient, snapshot, squared_distance

# Weights after step s and squared drifts at the switches of the official trainer: f = |w-(1,0)|^2/2 on alignment,
# h = |w-(0,1)|^2/2 on user steps, w0 = (0.2, 0.1), K1=2, K2=3, rho=1, 15 steps, clip 1, lr 0.1, penalty from s > 1.5.
SGD = {0: (0.28, 0.09), 2: (0.3168, 0.1729), 5: (0.339501, 0.274712), 9: (0.301048, 0.433222), 14: (0.322706, 0.512563)}
ADAMW = {0: (0.3, 0.0), 2: (0.452397, -0.008979), 5: (0.473921, 0.213151), 9: (0.479108, 0.454236)}
ADAMW[14] = (0.442658, 0.654974)
SGD_DRIFTS = {2: 0.023465, 5: 0.057659, 7: 0.020469, 10: 0.042904, 12: 0.021909}
ADAMW_DRIFTS = {2: 0.067664, 5: 0.049903, 7: 0.014306, 10: 0.038111, 12: 0.006165}


TARGETS = {"alignment": torch.tensor([1.0, 0.0]), "user": torch.tensor([0.0, 1.0])}


class _Quadratic:
    """Passes over a weight whose loss is its squared distance from the stream's target."""

    def __init__(self, w: Tensor) -> None:
        self.weights = [w]

    def gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        return 0.0, [self.weights[0].detach() - TARGETS[batch.stream]]


def run(method: Lisa, w: Tensor, lr: float, steps: int, clip: float, adam: bool) -> tuple[list[Tensor], dict]:
    """Train on quadratic user and alignment losses by the method, called as in the training loop."""
    optimizer = torch.optim.AdamW([w], lr, weight_decay=0.0) if adam else torch.optim.SGD([w], lr)
    backprop: Any = _Quadratic(w)
    state = method.init(backprop)
    path, drifts = [], {}
    for t in range(steps):
        state, measured = move_anchor(method, t, [w], state)
        if measured:
            drifts[t] = measured["switch/drift"]
        (stream,) = method.plan(t)
        (w.grad,) = method.gradient(backprop, Step(t, steps, {stream: Batch(stream, [], 0)}), state).gradients
        torch.nn.utils.clip_grad_norm_([w], clip)
        optimizer.step()
        path.append(w.detach().clone())
    return path, drifts


@pytest.mark.parametrize(("adam", "trace", "drifts"), [(False, SGD, SGD_DRIFTS), (True, ADAMW, ADAMW_DRIFTS)])
def test_equals_the_official_trace(adam: bool, trace: dict, drifts: dict) -> None:
    w = torch.nn.Parameter(torch.tensor([0.2, 0.1]))
    path, found = run(Lisa(2, 3, 1.0, 0.1), w, 0.1, 15, 1.0, adam)
    for step, wanted in trace.items():
        torch.testing.assert_close(path[step], torch.tensor(wanted), atol=2e-6, rtol=0)
    assert found == pytest.approx(drifts, abs=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, 5.0])
def test_exact_phases_reach_the_closed_form_fixed_point(rho: float) -> None:
    """Phases solved to the end reach w~* = ((1+rho)a + rho b)/(1+2rho), w* mirrored, drift |a-b|^2/(1+2rho)^2."""
    w = torch.nn.Parameter(torch.tensor([0.2, 0.1]))
    k = 60
    path, drifts = run(Lisa(k, k, rho, 0.0), w, 0.9 / (1 + rho), 80 * k, 1e9, adam=False)
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(path[-k - 1], ((1 + rho) * a + rho * b) / (1 + 2 * rho), atol=1e-4, rtol=0)
    torch.testing.assert_close(path[-1], ((1 + rho) * b + rho * a) / (1 + 2 * rho), atol=1e-4, rtol=0)
    assert list(drifts.values())[-1] == pytest.approx(2 / (1 + 2 * rho) ** 2, abs=1e-3)


@pytest.mark.parametrize("rho", [0.01, 1.0, 7.0])
def test_added_gradient_is_that_of_the_loss_term(rho: float) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(5, requires_grad=True)]
    anchor = [torch.randn(3, 4), torch.randn(5)]
    terms = [rho / 2 * torch.norm(w - a) ** 2 for w, a in zip(weights, anchor, strict=True)]
    penalty = torch.stack(terms).sum()
    wanted = torch.autograd.grad(penalty, weights)
    gradient = [torch.zeros_like(w) for w in weights]
    found = add_gradient(gradient, weights, anchor, rho)
    torch.testing.assert_close(gradient, list(wanted), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found, penalty.detach())


def test_distance_of_half_precision_weights_does_not_overflow() -> None:
    far = torch.full((16,), 200.0, dtype=torch.float16)
    assert squared_distance([far], snapshot([torch.zeros(16)])) == 16 * 200.0**2


def test_a_snapshot_does_not_follow_the_weights() -> None:
    w = torch.zeros(2)
    anchor = snapshot([w])
    w += 1
    assert squared_distance([w], anchor) == 2


def test_a_distance_of_half_precision_weights_is_told_in_float32() -> None:
    """The distance is computed in float32, since 1 - 0.0001 is 1 in bfloat16."""
    w, anchor = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1e-4], dtype=torch.bfloat16).float()
    assert squared_distance([w], [anchor]).item() == pytest.approx((1 - anchor.item()) ** 2, abs=1e-6)
