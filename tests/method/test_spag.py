"""Laws of SPAG: what its safe steps are at both ends of the threshold, and how far they go."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic.dataclasses import dataclass
from torch import Tensor

from helpers.recording import Recording
from helpers.training import Train, largest_difference
from lisa_lightning.config.fields import STRICT
from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.spag import SPAG
from lisa_lightning.trainer.module import LisaModule

HIGH = 100.0
"""Threshold above every loss."""


def spag(tau: float, delta: float = 0.0, alpha_max: float = 1.0, clip: float | None = 1.0, rows: int = 4) -> SPAG:
    return SPAG(tau, delta, alpha_max, rows, None, 4, clip)


def moments(module: LisaModule) -> list[dict[str, Tensor]]:
    optimizer: Any = module.optimizers()
    return [optimizer.optimizer.state[weight] for weight in module.weights]


@dataclass(frozen=True, config=STRICT)
class UserFirst(Method):
    """Alternation of a user step and an alignment step, without threshold and scales."""

    @property
    def schedule(self) -> Schedule:
        return Schedule(alignment_steps=1, user_steps=1, user_first=True)

    def lr_step(self, step: int) -> int:
        return 2 * (step // 2)


@pytest.mark.slow
def test_below_the_threshold_it_is_sft_bit_for_bit_in_twice_the_steps(train: Train) -> None:
    """Safe steps below the threshold change no weight, no moment, no step count and no rate of a later step.

    Weights decay, and the rate rises and falls. The run is resumed after a safe step.
    """
    seen, rates = Recording(), {"schedule": "linear", "warmup_ratio": 0.25}
    plain = train(SFT(), folder="sft", steps=8, loggers=[seen], **rates)
    twice = Recording()
    with pytest.raises(InterruptedError):
        train(spag(HIGH), folder="spag", steps=16, stop_after=7, **rates)
    module = train(spag(HIGH), folder="spag", steps=16, loggers=[twice], **rates)
    assert largest_difference(plain, module) == 0
    for ours, others in zip(moments(module), moments(plain), strict=True):
        assert all(torch.equal(ours[name], others[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    assert twice.values("train/lr") == [lr for lr in seen.values("train/lr")[3:] for _ in range(2)]
    assert {row.get("spag/triggered") for row in twice.steps} == {None, 0.0}
    assert largest_difference(module, train(spag(5.0), folder="triggered", steps=16, **rates)) > 1e-4


@pytest.mark.slow
def test_at_scale_one_it_is_alternation_that_begins_with_the_user(train: Train) -> None:
    """Safe steps whose scales are all capped at 1 are plain steps, clipped as the trainer clips.

    With dropout, micro-batches, and a clip that binds.
    """
    options: dict[str, Any] = {"dropout": 0.2, "steps": 6, "batch_size": 2, "accumulate": 2}
    method, seen = spag(0.0, clip=0.05), Recording()
    module = train(method, folder="spag", clip=0.05, loggers=[seen], **options)
    plain = train(UserFirst(), folder="plain", clip=0.05, **options)
    assert seen.values("train/state") == [0.0, 1.0] * 3
    assert [row["spag/triggered"] for row in seen.steps[1::2]] == [1.0] * 3
    assert [row["spag/safe_loss"] for row in seen.steps[1::2]] == seen.values("train/loss")[1::2]
    assert largest_difference(module, plain) < 1e-6
    assert largest_difference(module, train(spag(0.0, clip=None), folder="other", clip=0.05, **options)) > 1e-6


@pytest.mark.slow
def test_scaled_gradients_are_not_clipped_again(train: Train) -> None:
    """With an epsilon at which a gradient's length counts, tripled safe gradients move the weights further."""
    options: dict[str, Any] = {"steps": 2, "eps": 1.0, "clip": 1e-3, "weight_decay": 0.0}
    start = train(SFT(), folder="start", **options | {"steps": 1})
    moves = {}
    for alpha_max in (1.0, 3.0):
        module = train(spag(0.0, alpha_max=alpha_max, clip=1e-3), folder=f"{alpha_max}", **options)
        moves[alpha_max] = [a.detach() - b.detach() for a, b in zip(module.weights, start.weights, strict=True)]
    once, thrice = (torch.cat([m.flatten() for m in moves[alpha_max]]).norm().item() for alpha_max in (1.0, 3.0))
    assert thrice > 1.5 * once


def test_the_threshold_has_the_tolerance_and_is_strict(train: Train) -> None:
    seen = Recording()
    train(spag(HIGH), folder="first", steps=2, loggers=[seen])
    loss = seen.steps[1]["spag/safe_loss"]
    for tau, delta, triggered in ((loss, 0.0, 0.0), (loss - 0.25, 0.25, 0.0), (loss - 0.25, 0.125, 1.0)):
        again = Recording()
        train(spag(tau, delta), folder=f"{tau} {delta}", steps=2, loggers=[again])
        assert again.steps[1]["spag/triggered"] == triggered


@given(st.integers(0, 2**32 - 1), st.floats(0.0, 5.0), st.floats(0.01, 5.0), st.floats(0.01, 10.0))
def test_a_scaled_tensor_is_no_longer_than_the_excess_and_than_its_largest_scale(
    seed: int, tau: float, excess: float, alpha_max: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(3, 2, generator=generator) * 10.0**i for i in range(-3, 2)]
    scales = spag(tau, delta=0.3, alpha_max=alpha_max).scales(tau + excess, gradients)
    for gradient, scale in zip(gradients, scales.tolist(), strict=True):
        norm = gradient.norm().item()
        assert scale == pytest.approx(min(excess / norm, alpha_max), rel=1e-4)
        assert scale * norm <= min(excess, alpha_max * norm) * (1 + 1e-4)


def test_a_tensor_without_gradient_stays_without_one() -> None:
    zeros = torch.zeros(2, 2)
    scale = spag(0.0, alpha_max=2.0).scales(5.0, [zeros, torch.ones(2)])
    assert scale.isfinite().all()
    assert torch.equal(zeros * scale[0], zeros)


def test_user_rows_follow_optim_and_safe_rows_their_own_number() -> None:
    method = spag(0.0, rows=3)
    plans = [next(iter(method.plan(t).items())) for t in range(5)]
    assert [(stream, batch.steps_before, batch.size) for stream, batch in plans] == [
        ("user", 0, None),
        ("alignment", 0, 3),
        ("user", 1, None),
        ("alignment", 1, 3),
        ("user", 2, None),
    ]
