"""Training in float16: scaled losses, skipped steps and their checkpoints, on a CPU's float16 autocast."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.methods import METHODS, each
from helpers.recording import Recording
from helpers.training import Train, largest_difference, weights
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.interleave import Step
from lisa_lightning.method.base import Method
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.lora import attach, load
from lisa_lightning.objective import loss_scale
from lisa_lightning.objective.backprop import Backprop, State, StepOutput
from lisa_lightning.objective.loss_scale import GradientOverflowError, LossScale
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer import module as trainer_module
from lisa_lightning.trainer.module import LisaModule

TOO_LARGE = 2.0**40
QUICK = ("lisa",)
SETS_WEIGHTS = "salora"
"""The method that sets the weights, and the anchor with them, at the start of a training."""


@pytest.fixture
def initial_scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the scale with which training in float16 starts."""
    return lambda value: monkeypatch.setattr(trainer_module, "LossScale", partial(LossScale, value))


def scale_of(module: LisaModule) -> LossScale:
    scale = module.backprop.loss_scale
    assert scale is not None
    return scale


def fresh(tiny: Path) -> dict[str, Tensor]:
    """Return the adapter before training, as `train` attaches it."""
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    return {name: weight.detach() for name, weight in trainable(net).items()}


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_scaling_by_a_power_of_two_changes_no_bit_in_float32(
    train: Train, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained = partial(train, METHODS[name](), 0.2, steps=5, batch_size=2, accumulate=2)
    plain = trained(folder="plain")
    monkeypatch.setattr(trainer_module, "_take_over_scaling", lambda trainer: LossScale())
    scaled = trained(folder="scaled")
    assert scale_of(scaled).good_steps == 5
    assert largest_difference(plain, scaled) == 0


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_a_method_in_float16_moves_the_weights_as_in_float32(
    train: Train, tiny: Path, initial_scale: Any, name: str
) -> None:
    """Weights move in float16 as in float32, to 3 % of the movement.

    AdamW's epsilon is so large that the size of a gradient counts, and no step is skipped at the scale.
    """
    initial_scale(2.0**10)
    trained = partial(train, METHODS[name](), steps=4, eps=1.0, lr=0.5, weight_decay=0.0)
    module = trained(folder="half", float16=True)
    assert scale_of(module).good_steps == 4
    single = trained(folder="single")
    start = single.state["anchor"] if name == SETS_WEIGHTS else fresh(tiny).values()
    moved = flat([w - other for w, other in zip(single.weights, start, strict=True)])
    error = flat([w - other for w, other in zip(module.weights, single.weights, strict=True)])
    assert 0 < error.norm() < 0.03 * moved.norm()


def test_a_gradient_that_underflows_in_float16_is_float32s_with_scaling(train: Train) -> None:
    module = train(SFT(), steps=3)
    backprop: Any = module.backprop
    batch = module.trainer.datamodule.steps[0].main  # type: ignore[attr-defined]
    small = 2.0**-26
    mean_loss = backprop.mean_loss(batch)

    def gradient() -> Tensor:
        loss, gradients = backprop.gradient(batch, lambda packs, index: small * mean_loss(packs, index))
        assert loss == pytest.approx(expected_loss, rel=1e-3)
        return flat(gradients)

    expected_loss = small * backprop.gradient(batch)[0]
    expected = gradient()
    with torch.autocast("cpu", torch.float16):
        assert gradient().norm() < 0.1 * expected.norm()
        backprop.loss_scale = LossScale(2.0**26)
        assert (gradient() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_a_step_that_overflows_changes_nothing_but_the_scale(
    train: Train, tiny: Path, initial_scale: Any, name: str
) -> None:
    initial_scale(TOO_LARGE)
    recording = Recording()
    module = train(METHODS[name](), 0.0, steps=3, float16=True, loggers=[recording])
    assert module.trainer.global_step == 3
    assert scale_of(module).value == TOO_LARGE / 8
    assert recording.values("train/loss_scale") == [TOO_LARGE, TOO_LARGE / 2, TOO_LARGE / 4]
    assert recording.values("train/skipped") == [1, 1, 1]
    optimizer: Any = module.optimizers()
    assert not optimizer.optimizer.state
    if name == SETS_WEIGHTS:
        assert all(map(torch.equal, module.weights, module.state["anchor"]))
        return
    start = fresh(tiny)
    assert all(torch.equal(weight, start[name]) for name, weight in weights(module).items())
    with torch.autocast("cpu", torch.float16):
        initial = module.method.start(module.backprop, module.method.init(module.backprop))
    assert module.state.keys() == initial.keys()
    assert all(map(torch.equal, flat_state(module.state), flat_state(initial)))


def flat_state(state: dict[str, list[Tensor]]) -> list[Tensor]:
    return [tensor for name in sorted(state) for tensor in state[name]]


class _Skipping(Method):
    """SFT whose gradients overflow in the first steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def gradient(self, backprop: Backprop, step: Step, state: State) -> StepOutput:
        if step.index < self.steps:
            raise GradientOverflowError
        return super().gradient(backprop, step, state)


@pytest.mark.slow
def test_training_goes_on_after_skipped_steps_as_in_float32(
    train: Train, tiny: Path, initial_scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial_scale(TOO_LARGE)
    recording = Recording()
    trained = partial(train, steps=30, eps=1.0, lr=0.5)
    module = trained(SFT(), float16=True, loggers=[recording])
    skipped = [step for step, row in recording.rows.items() if "train/skipped" in row]
    assert skipped == [*range(1, len(skipped) + 1)]
    assert 10 < len(skipped) < 25
    assert scale_of(module).value == TOO_LARGE / 2 ** len(skipped)
    assert all(("train/loss" in row) != ("train/skipped" in row) for row in recording.steps)
    monkeypatch.setattr(trainer_module, "_take_over_scaling", lambda trainer: LossScale(TOO_LARGE))
    half, single = weights(module), weights(trained(_Skipping(len(skipped)), folder="single"))
    start = fresh(tiny)
    moved = flat([single[name] - start[name] for name in start])
    assert flat([half[name] - single[name] for name in start]).norm() < 0.03 * moved.norm()


@pytest.mark.slow
def test_resume_equals_the_straight_run_bit_for_bit_with_its_scale(
    train: Train, initial_scale: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run has the weights and the scale of the straight one.

    The scale doubles so often that steps are skipped again and again.
    """
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 2)
    initial_scale(2.0**26)
    recording = Recording()
    trained = partial(train, Lisa(2, 3, 1.0, 0.3), 0.2, float16=True, steps=20)
    straight = trained(folder="straight", loggers=[recording])
    assert 2 < sum(row.get("train/skipped", 0.0) for row in recording.steps) < 15
    with pytest.raises(InterruptedError):
        trained(folder="broken", stop_after=7)
    resumed = trained(folder="broken")
    assert largest_difference(straight, resumed) == 0
    assert scale_of(straight).state_dict() == scale_of(resumed).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("method", [SFT(), METHODS["booster"]()])
def test_a_run_that_diverges_ends_in_a_sentence(train: Train, initial_scale: Any, method: Method) -> None:
    initial_scale(4.0)
    with pytest.raises(InterruptedError):
        train(method, float16=True, stop_after=5)
    with pytest.raises(UserError, match=r"16-mixed: .* at the loss scale 1\. Fix: .* The last good checkpoint is /"):
        train(method, float16=True, lr=1e30)


def test_a_good_step_may_double_the_scale_and_a_skipped_one_halves_it() -> None:
    scale = LossScale()
    for _ in range(1999):
        scale.update(skipped=False)
    scale.update(skipped=True)
    assert scale.state_dict() == {"value": 2.0**15, "good_steps": 0}
    for _ in range(2000):
        assert scale.value == 2.0**15
        scale.update(skipped=False)
    assert scale.state_dict() == {"value": 2.0**16, "good_steps": 0}


def test_other_precisions_have_no_scale_in_their_checkpoint(train: Train, tmp_path: Path) -> None:
    assert train(SFT(), steps=3).backprop.loss_scale is None
    assert "loss_scale" not in torch.load(tmp_path / "run.ckpt", weights_only=True)
