"""Equalities between runs of the training loop on the tiny model, exact if the test says so."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from helpers.composing import composed
from helpers.training import STEPS, USER, Train, largest_difference, weights
from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.joint_gradient import JointGradient
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import Lora
from lisa_lightning.method.base import Method
from lisa_lightning.method.bso import BSO
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.proximal import Proximal
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.lora import attach, load
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime import launch
from lisa_lightning.runtime.errors import UserError


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
@pytest.mark.parametrize(("minutes", "patience"), [(90, 90), (1, 5)])
def test_ranks_start_within_minutes_and_collectives_wait_as_long_as_the_config_says(
    monkeypatch: pytest.MonkeyPatch, strategy: str, minutes: float, patience: float
) -> None:
    trainer = SimpleNamespace(
        accelerator="cpu", num_nodes=1, precision="32-true", devices=2, strategy=strategy, timeout_min=minutes
    )
    fabric: Any = launch.make_fabric(trainer)
    assert fabric.strategy._timeout == launch.START_TIMEOUT == timedelta(minutes=5)
    timeouts: list[timedelta] = []
    monkeypatch.setattr(fabric, "launch", lambda: None)
    monkeypatch.setattr(launch.Watch, "connect", lambda _: None)
    monkeypatch.setattr(launch.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(launch.distributed_c10d, "_set_pg_timeout", timeouts.append)
    with launch.launch_ranks(fabric, minutes):
        assert timeouts == [timedelta(minutes=patience)]


def test_a_checkpoint_that_the_first_rank_can_not_write_stops_all(tmp_path: Path) -> None:
    """All ranks stop if the first one can't write a checkpoint.

    Each rank passes one barrier before the exchange of the error: Lightning's after the writing, or ours in its place.
    """
    told: list[str | None] = []
    for first in (True, False):
        passed: list[str] = []

        def save(_: Path, first: bool = first, passed: list[str] = passed) -> None:
            if first:
                raise UserError("full")
            passed.append("barrier")

        strategy = SimpleNamespace(
            barrier=lambda passed=passed: passed.append("barrier"), broadcast=lambda x: told.append(x) or told[0]
        )
        trainer: Any = SimpleNamespace(global_step=3, save_checkpoint=save, strategy=strategy)
        with pytest.raises(UserError, match="full"):
            Checkpoint(tmp_path, every=3).on_train_batch_end(trainer, None)  # type: ignore[arg-type]
        assert passed == ["barrier"]
    assert told == ["full", None]


@pytest.mark.slow
def test_rho_zero_is_bso_bit_for_bit(train: Train) -> None:
    assert largest_difference(train(Lisa(2, 3, 0.0, 0.1), folder="a"), train(BSO(2, 3), folder="b")) == 0


@pytest.mark.slow
def test_no_alignment_steps_and_rho_zero_is_sft_bit_for_bit(train: Train) -> None:
    assert largest_difference(train(Lisa(0, 3, 0.0, 0.1), folder="a"), train(SFT(), folder="b")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", [Lisa(0, 1, 1.0, 0.5), Proximal(1.0, 0.5)])
def test_the_penalty_rests_up_to_its_share_of_the_steps_and_no_longer(train: Train, method: Method) -> None:
    assert largest_difference(train(method, folder="a", steps=2), train(SFT(), folder="b", steps=2)) == 0
    assert largest_difference(train(method, folder="c", steps=4), train(SFT(), folder="d", steps=4)) > 1e-6


@pytest.mark.slow
def test_the_penalty_alone_is_lisa_without_alignment_steps_bit_for_bit(train: Train) -> None:
    alone = train(Proximal(1.0, 0.1), folder="a")
    assert largest_difference(alone, train(Lisa(0, 1, 1.0, 0.1), folder="b")) == 0
    assert largest_difference(alone, train(Proximal(0.0, 0.1), folder="c")) > 1e-5
    assert largest_difference(train(Proximal(0.0, 0.1), folder="d"), train(SFT(), folder="e")) == 0


@pytest.mark.slow
def test_the_joint_gradient_is_autograds_and_disturbs_nothing(train: Train) -> None:
    joint = JointGradient(rows=2, every=7)
    plain, measured = train(Lisa(2, 3, 1.0, 0.1), folder="a"), train(Lisa(2, 3, 1.0, 0.1), folder="b", more=[joint])
    assert largest_difference(plain, measured) == 0
    metrics = joint._measurement(measured)
    net: Any = measured.net.eval()
    losses = {s: completion_loss(net.get_base_model(), packs) / n for s, (packs, n) in joint.packs.items()}
    gradients = torch.autograd.grad(losses["user"] + losses["alignment"], measured.weights)
    norm = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert metrics["eval/gradient_norm"] == pytest.approx(norm, rel=1e-5)
    for state, loss in losses.items():
        assert metrics[f"eval/{state}_loss"] == pytest.approx(loss.item(), rel=1e-5)
    labels = [len(row.response) + 1 for row in USER]  # bytes, and the end of text
    assert joint.packs["user"][1] == labels[0] + labels[4] != labels[0] + labels[1]


@pytest.mark.slow
def test_lisa_differs_from_bso_and_bso_from_sft(train: Train) -> None:
    lisa, bso, sft = (train(m, folder=type(m).__name__) for m in (Lisa(2, 3, 1.0, 0.1), BSO(2, 3), SFT()))
    assert min(largest_difference(lisa, bso), largest_difference(bso, sft)) > 1e-3


def test_every_adapter_weight_moves_and_nothing_else(train: Train, tiny: Path) -> None:
    module = train(Lisa(2, 3, 0.1, 0.0))
    fresh = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    new = dict(module.net.named_parameters())
    for name, old in fresh.named_parameters():
        assert torch.equal(old, new[name]) != old.requires_grad, name


def test_moments_are_not_reset_at_a_switch(train: Train) -> None:
    """AdamW's own step count is that of the run, so that a switch resets nothing."""
    module = train(BSO(2, 3))
    optimizer = module.optimizers().optimizer  # type: ignore[union-attr]
    assert {int(state["step"]) for state in optimizer.state.values()} == {STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stop", [4, 5, 6, 12])
def test_resume_equals_the_straight_run_bit_for_bit(train: Train, stop: int, dropout: float) -> None:
    """A run that is interrupted and resumed equals the straight one, dropout included.

    The interruption is inside a state, at a switch, in warm-up or near the end.
    """
    make = partial(Lisa, 2, 3, 1.0, 0.3)
    straight = train(make(), dropout, folder="straight")
    with pytest.raises(InterruptedError):
        train(make(), dropout, folder="broken", stop_after=stop)
    assert largest_difference(straight, train(make(), dropout, folder="broken")) == 0


def test_resuming_a_finished_run_changes_nothing(train: Train) -> None:
    first = train(Lisa(2, 3, 1.0, 0.1))
    assert largest_difference(first, train(Lisa(2, 3, 1.0, 0.1))) == 0


def test_a_checkpoint_holds_plain_containers_and_the_adapter_alone(train: Train, tmp_path: Path) -> None:
    module = train(Lisa(2, 3, 1.0, 0.1), folder="run")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == weights(module).keys()
    assert len(saved["method_state"]["anchor"]) == len(weights(module))


def test_a_checkpoint_that_would_have_to_be_unpickled_is_not_loaded(train: Train, tmp_path: Path) -> None:
    torch.save({"state_dict": SimpleNamespace()}, tmp_path / "run.ckpt")
    with pytest.raises(UserError, match="UnpicklingError: Weights only load failed"):
        train(SFT())


def test_a_checkpoint_of_another_run_is_refused_by_name(train: Train) -> None:
    with pytest.raises(InterruptedError):
        train(Lisa(2, 3, 1.0, 0.1), stop_after=5, key={"method": {"rho": 1.0}})
    with pytest.raises(UserError, match=r"method\.rho: 1\.0 stored, 2\.0 requested"):
        train(Lisa(2, 3, 2.0, 0.1), key={"method": {"rho": 2.0}})


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_loss_that_turns_nan_stops_names_the_step_and_keeps_the_last_checkpoint(
    train: Train, tmp_path: Path, clip: float | None
) -> None:
    """A loss that is no number ends the run with the step's number, and the last checkpoint stays.

    An absurd learning rate throws weights to infinity, which gives such a loss in the next step.
    """
    with pytest.raises(InterruptedError):
        train(SFT(), stop_after=5)
    before = (tmp_path / "run.ckpt").read_bytes()
    with pytest.raises(UserError, match=r"The loss of step 4 is nan; .* The last good checkpoint is /.*/run\.ckpt\."):
        train(SFT(), lr=1e30, clip=clip)
    assert (tmp_path / "run.ckpt").read_bytes() == before


def test_a_checkpoint_is_mentioned_only_where_there_is_one(train: Train) -> None:
    with pytest.raises(UserError, match=r"may help\.$"):
        train(SFT(), lr=1e30)


@pytest.mark.slow
def test_a_stage_that_diverges_is_told_by_its_own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = ["experiment=smoke", "stages=[align]", f"cache_dir={tmp_path / 'cache'}"]
    with pytest.raises(UserError, match=r"A smaller align\.optim\.lr \(now 1e\+30\) or align\.optim\.clip"):
        run(composed([*words, "align.optim.lr=1e30"], tmp_path / "out"))


@pytest.mark.slow
def test_a_gradient_is_clipped_where_it_is_longer_and_nowhere_else(train: Train) -> None:
    free = train(SFT(), folder="free", clip=None)
    assert largest_difference(free, train(SFT(), folder="far", clip=1e9)) == 0
    assert largest_difference(free, train(SFT(), folder="near", clip=0.1)) > 1e-4


def test_rows_without_a_label_are_told_once_and_teach_nothing(
    train: Train, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows without a label are reported once and change no weight.

    The first twelve bytes of every user row, to which it is cut, are its prompt.
    """
    cut = train(SFT(), max_length=12, weight_decay=0.0)
    assert caplog.text.count("data.max_length cuts off wholly") == 1
    fresh = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    assert all(torch.equal(old, weights(cut)[name]) for name, old in trainable(fresh).items())


@pytest.mark.parametrize(("schedule", "wanted"), [("constant", [1, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.125])])
def test_learning_rate(schedule: Literal["constant", "linear"], wanted: list[float]) -> None:
    optim = Optim(lr=1.0, steps=10, schedule=schedule, warmup_ratio=0.2)
    assert [optim.lr_at(t) for t in (0, 1, 2, 9)] == pytest.approx(wanted)


def test_the_net_trains_in_training_mode_with_float32_factors(tiny: Path) -> None:
    net = attach(load(tiny, "bfloat16"), Lora(r=4, alpha=8, dropout=0.1, targets="all-linear"), 0)
    assert all(m.training for m in net.modules())
    assert {w.dtype for w in trainable(net).values()} == {torch.float32}
