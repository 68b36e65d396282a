"""Lightning as its users know it: bare Trainers, loggers, callbacks, checkpoints and time limits."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from helpers.composing import composed
from helpers.training import ALIGNMENT, USER, largest_difference
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.logger.curves import Curves, read_rows
from lisa_lightning.logger.curves_logger import CurvesLogger
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
IGNORED_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`max_epochs` was not set"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]
pytestmark = IGNORED_WARNINGS


@pytest.fixture
def parts(tiny: Path) -> Callable[[], tuple[LisaModule, LisaDataModule]]:
    """Return a maker of a module and its data, with dropout, in cycles of 2 alignment and 3 user steps."""

    def made() -> tuple[LisaModule, LisaDataModule]:
        lora = Lora(r=4, alpha=8, dropout=0.2, targets="all-linear")
        rows = [{"instruction": row.instruction, "response": row.response} for row in USER]
        tokenizer = load_tokenizer(tiny)
        data = LisaDataModule(tokenizer, rows, ALIGNMENT, batch_size=2, max_length=128, template="alpaca")
        net = attach(load(tiny, "float32"), lora, 0)
        return LisaModule(net, Lisa(2, 3, 1.0, 0.0), Optim(lr=5e-3, steps=11), seed=3), data

    return made


def fitted(trainer: L.Trainer, parts: Callable[[], tuple[LisaModule, LisaDataModule]], **more: Any) -> LisaModule:
    module, data = parts()
    trainer.fit(module, datamodule=data, **more)
    return module


def numbers(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows without times, empty cells and the stage."""
    return [{k: v for k, v in row.items() if v and k != "stage" and not k.startswith("time/")} for row in rows]


def test_a_bare_trainer_stops_after_the_last_step_and_logs_what_curves_csv_holds(
    tmp_path: Path, parts: Callable[[], tuple[LisaModule, LisaDataModule]]
) -> None:
    bare = L.Trainer(logger=CSVLogger(str(tmp_path), "bare", "0"), default_root_dir=tmp_path, **QUIET)
    fitted(bare, parts)
    assert bare.global_step == 11
    curves = CurvesLogger(Curves(tmp_path / "curves.csv"), "finetune")
    fitted(L.Trainer(logger=curves, default_root_dir=tmp_path, **QUIET), parts)
    with (tmp_path / "bare" / "0" / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert numbers(logged) == numbers(read_rows(tmp_path / "curves.csv"))
    assert {"proximal/penalty", "switch/drift", "train/lr"} <= logged[0].keys()
    assert [row["switch/drift"] != "" for row in logged] == [s in (3, 6, 8, 11) for s in range(1, 12)]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_resuming_by_ckpt_path_in_the_middle_of_a_state_changes_no_bit(
    tmp_path: Path, parts: Callable[[], tuple[LisaModule, LisaDataModule]], step: int
) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = partial(L.Trainer, logger=False, default_root_dir=tmp_path, **QUIET)
    straight = fitted(trainer(callbacks=[saving]), parts)
    resumed = fitted(
        trainer(enable_checkpointing=False), parts, ckpt_path=str(tmp_path / f"step={step}.ckpt"), weights_only=True
    )
    assert largest_difference(straight, resumed) == 0
    for a, b in zip(straight.state["anchor"], resumed.state["anchor"], strict=True):
        assert torch.equal(a, b)


def run_smoke(out: Path, *overrides: str) -> dict[str, Any]:
    small = ["experiment=smoke", "stages=[align,finetune]", "evaluate.every=0", f"cache_dir={out}-cache"]
    run(composed([*small, "optim.steps=8", "align.optim.steps=2", *overrides], out))
    return json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
def test_max_time_stops_at_a_step_with_a_checkpoint_and_leaves_the_run_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    elapsed = iter([0.0])
    timer = "lightning.pytorch.callbacks.timer.Timer.time_elapsed"
    monkeypatch.setattr(timer, lambda self, stage=None: next(elapsed, 3600.0))
    with pytest.raises(UserError, match=r"max_time=00:01:00:00: stage align stopped after step 1 of 2.*resume=true"):
        run_smoke(tmp_path / "out", "trainer.max_time=00:01:00:00")
    assert (tmp_path / "out" / "checkpoints" / "align.ckpt").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    resumed = run_smoke(tmp_path / "out", "trainer.max_time=01:00:00:00", "resume=true")
    assert resumed["train/steps"] == 8
    run_smoke(tmp_path / "straight")
    curves = [numbers(read_rows(tmp_path / name / "curves.csv")) for name in ("out", "straight")]
    assert curves[0] == curves[1]


@pytest.mark.slow
def test_loggers_and_callbacks_of_the_config_see_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    out = tmp_path / "out"
    stopping = ("monitor=train/lr", "every=2", "patience=1")
    early_stopping = [f"callbacks.early_stopping.{setting}" for setting in stopping]
    chosen = ["logger=csv", "callbacks=[learning_rate_monitor,early_stopping]", *early_stopping]
    metrics = run_smoke(out, *chosen)
    assert metrics["train/steps"] < 8  # the learning rate of the smoke experiment falls
    rows = [row for row in read_rows(out / "curves.csv") if row["stage"] == "finetune"]
    curves = {row["step"]: row for row in numbers(rows)}
    assert by_step(out) == curves
    assert all(row["lr-AdamW"] for row in rows[:-1])
    run_smoke(tmp_path / "cached", *chosen, f"cache_dir={out}-cache")
    assert by_step(tmp_path / "cached") == curves


def by_step(out: Path) -> dict[str, dict[str, str]]:
    """Return the rows of Lightning's CSVLogger, which has a row for every call; those of a step are merged."""
    merged: dict[str, dict[str, str]] = {}
    with (out / "csv" / "finetune" / "metrics.csv").open(newline="") as file:
        for row in numbers(list(csv.DictReader(file))):
            merged.setdefault(row["step"], {}).update(row)
    return merged
