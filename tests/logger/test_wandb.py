"""Curves on disk and in W&B: one row a step, over interruptions."""

import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from lisa_lightning.logger.curves import Curves, numbers, read_rows
from lisa_lightning.logger.run_loggers import RunLoggers


def test_columns_may_come_later_and_empty_cells_stay_empty(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "curves.csv")
    curves.log("finetune", 1, {"a": 1.5})
    curves.log("finetune", 2, {"a": 2.5, "b": 3.0})
    assert curves.rows() == [
        {"stage": "finetune", "step": "1", "a": "1.5", "b": ""},
        {"stage": "finetune", "step": "2", "a": "2.5", "b": "3.0"},
    ]


@pytest.mark.parametrize("half", ["finetune,4", "finetune,4,0."])
def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path, half: str) -> None:
    curves = Curves(tmp_path / "curves.csv")
    for step in (1, 2, 3):
        curves.log("finetune", step, {"a": step})
    with curves.path.open("a") as file:
        file.write(half)
    again = Curves(curves.path)
    again.log("finetune", 4, {"a": 4})
    assert [(r["step"], r["a"]) for r in again.rows()] == [(str(s), str(s)) for s in (1, 2, 3, 4)]


def test_a_stage_that_goes_on_forgets_what_it_will_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    first = RunLoggers(tmp_path, {}, resumed=False)
    for stage in ("align", "finetune"):
        for step in range(1, 6):
            _log(first, stage, step, {"a": float(step)})
    again = RunLoggers(tmp_path, {}, resumed=True)
    again.start("finetune", 3, _digest(first, 3))
    _log(again, "finetune", 4, {"a": 4.0})
    assert [(r["stage"], r["step"]) for r in read_rows(tmp_path / "curves.csv")] == [
        *(("align", str(s)) for s in range(1, 6)),
        *(("finetune", str(s)) for s in range(1, 5)),
    ]


def _log(loggers: RunLoggers, stage: str, step: int, metrics: dict[str, float]) -> None:
    """Log one step of a stage, and finalize its loggers."""
    for logger in loggers.of_stage(stage):
        logger.log_metrics(metrics, step)
        logger.finalize("success")


def _digest(loggers: RunLoggers, step: int) -> str:
    """Return the hash of fine-tuning's curves up to a step, as a checkpoint has it."""
    curves = Curves(loggers.curves.path.with_name("copy.csv"))
    for row in loggers.curves.rows("finetune"):
        if int(row["step"]) <= step:
            curves.log("finetune", int(row["step"]), numbers(row))
    return curves.digest("finetune")


class _Runs:
    """Stand-in for W&B, as far as a tracker needs it: runs by id, whose summary holds the last logged values."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.runs: dict[str, Any] = {}

    def init(self, **told: Any) -> Any:
        self.told.append(told)
        if told.get("resume"):
            return self.runs[told["id"]]
        run = MagicMock(id=f"run{len(self.runs)}", summary={}, logged=[])
        run.log.side_effect = lambda row: (run.logged.append(row), run.summary.update(row))
        self.runs[run.id] = run
        return run


@pytest.mark.parametrize("held", [5, 2])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_resumed_run_holds_every_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, held: int
) -> None:
    """A resumed run holds every step once.

    The run is interrupted after step 5, with the last checkpoint at step 3. W&B may have fewer steps of an online run
    than were made.
    """
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", mode)
    wandb = _Runs()
    monkeypatch.setattr("wandb.init", wandb.init)
    first = RunLoggers(tmp_path, {"config": {}}, resumed=False)
    _log(first, "align", 1, {"train/loss": 9.0})
    for step in range(1, 6):
        _log(first, "finetune", step, {"user/loss": 10.0 - step, "eval/accuracy": 1.0, "eval/accuracy_low": 0.0})
    (run,) = wandb.runs.values()
    run.logged = [row for row in run.logged if row.get("trainer/global_step", 0) <= held]
    run.summary["trainer/global_step"] = held
    again = RunLoggers(tmp_path, {"config": {}}, resumed=True)
    again.take_over(read_rows(tmp_path / "curves.csv")[:1])
    again.start("finetune", 3, _digest(first, 3))
    for step in range(4, 8):
        _log(again, "finetune", step, {"user/loss": 10.0 - step, "eval/accuracy": 1.0, "eval/accuracy_low": 0.0})
    goes_on = {key: wandb.told[-1].get(key) for key in ("id", "resume", "mode")}
    if mode == "online":
        assert goes_on == {"id": "run0", "resume": "must", "mode": "online"}
    else:
        assert goes_on == {"id": None, "resume": None, "mode": "offline"}
        assert wandb.told[-1]["config"] == {"resumed_from": "run0"}
        run = wandb.runs["run1"]
    losses = [(row["trainer/global_step"], row["user/loss"]) for row in run.logged if "user/loss" in row]
    assert losses == [(step, 10.0 - step) for step in range(1, 8)]
    assert [row["stage/align_step"] for row in run.logged if "align/loss" in row] == [1]
    assert not any("eval/accuracy_low" in row for row in run.logged)


@pytest.mark.slow
def test_an_offline_run_is_read_by_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    init = {"project": "p", "group": "g", "config": {"method": {"rho": 1.0}}}
    first = RunLoggers(tmp_path, init, resumed=False)
    _log(first, "align", 1, {"train/loss": 2.0, "defender/loss": 3.0})
    for step in range(5):
        _log(first, "finetune", step, {"user/loss": 10.0 - step, "ewc/penalty": 0.0})
    first.wandb.finish(failed=True)
    again = RunLoggers(tmp_path, init, resumed=True)
    again.start("finetune", 3, _digest(first, 3))
    _log(again, "finetune", 4, {"user/loss": 6.0})
    again.wandb.summarize({"final/accuracy": 90.0}, [{"prompt": "p", "response": "r"}])
    folder = again.wandb.offline_folder
    assert folder is not None
    again.wandb.finish(failed=False)
    wandb = str(Path(sys.executable).with_name("wandb"))
    shown = subprocess.run([wandb, "leet", "inspect", "--summary", folder], capture_output=True, text=True, check=True)
    for name in ("user/loss", "final/accuracy", "trainer/global_step"):
        assert name in shown.stdout
    first_run = subprocess.run(
        [wandb, "leet", "inspect", "--summary", str(first.wandb.offline_folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("align/loss", "align/defender_loss", "ewc/penalty"):
        assert name in first_run.stdout
