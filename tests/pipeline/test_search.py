"""Searches: the attacker's objective, trials that are the same after an interruption, and runs for comparison."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import open_dict

from helpers.composing import composed_job
from helpers.forking import Forked
from helpers.judged_runs import save_run
from helpers.paths import CONF
from lisa_lightning.pipeline.search import (
    _compared_overrides,
    attacker_value,
    search_value,
    searched_score,
)
from lisa_lightning.pipeline.sweep import ATTACKERS, resolve_sweep_dir, run_job
from lisa_lightning.report.search_trials import Objective, read_trials
from lisa_lightning.runtime.errors import UserError

PERCENT = st.floats(0, 100)


@given(*[PERCENT] * 5)
def test_a_model_that_counts_is_above_every_other_one(
    floor: float, harm: float, other_harm: float, accuracy: float, other: float
) -> None:
    value, other_value = attacker_value(harm, accuracy, floor), attacker_value(other_harm, other, floor)
    counts, other_counts = (a >= floor - 1e-9 for a in (accuracy, other))
    if counts:
        assert value == harm >= 0
    if counts and not other_counts:
        assert value > other_value
    if not counts and not other_counts and accuracy < other:
        assert value <= other_value < 0  # the nearer to the floor, the better


def test_the_attacker_needs_nine_tenths_of_the_undefended_accuracy(tmp_path: Path) -> None:
    run = save_run(tmp_path, [i % 4 == 0 for i in range(150)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert searched_score(metrics, run) == pytest.approx(100 * 38 / 75)  # indices 0, 4, 8 ... of the even ones
    objective = Objective("attacker", 0.9, 80.0)
    values = [search_value(objective, {**metrics, "final/accuracy": a}, run) for a in (72.0, 71.0)]
    assert values == [pytest.approx(100 * 38 / 75), pytest.approx(-1.0)]
    single = save_run(tmp_path / "single", [True], ["one prompt"])
    with pytest.raises(UserError, match="two harmful prompts at least"):
        searched_score(json.loads((single / "metrics.json").read_text()), single)


def test_objectives_by_name_and_by_expression(tmp_path: Path) -> None:
    metrics = {"final/accuracy": 90.0, "final/harmful_score": 9.0}
    assert search_value(Objective("defender"), metrics, tmp_path) == 81.0
    assert search_value(Objective("final/accuracy / final/harmful_score"), metrics, tmp_path) == 10.0


class FakeLauncher:
    """Launcher whose jobs take no time. It can be interrupted before a new job."""

    def __init__(self, results: dict[tuple[str, ...], float | None], new_jobs: int) -> None:
        """Take the results of finished jobs, and the number of new jobs before the interruption."""
        self.results, self.new_jobs, self.order = results, new_jobs, []

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        """Return results as Hydra does, from finished jobs if there are any."""
        return [type("JobReturn", (), {"return_value": self._result(tuple(sorted(job)))})() for job in jobs]

    def _result(self, job: tuple[str, ...]) -> float | None:
        self.order.append(job)
        if job not in self.results:
            if self.new_jobs == 0:
                raise KeyboardInterrupt
            self.new_jobs -= 1
            settings = {key: float(value) for key, value in (line.split("=") for line in job)}
            accuracy = 90 - 20 * (math.log10(settings["optim.lr"]) + 3) ** 2
            harm = 100 * settings["harmful_ratio"] + settings["lora.r"] + settings["optim.steps"] / 10
            # A tenth of the trials fails, and always so.
            fails = int(1e7 * settings["optim.lr"]) % 10 == 0
            self.results[job] = None if fails else attacker_value(harm, accuracy, 81)
        return self.results[job]


def search(folder: Path, trials: int, results: dict[tuple[str, ...], float | None], new_jobs: int = -1) -> list[Any]:
    """Run the committed search with jobs that take no time, and return them in order."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", ["sweep=attack", f"hydra.sweeper.n_trials={trials}"], return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.sweep.dir = str(folder)
    sweeper = instantiate(cfg.hydra.sweeper)
    launcher = FakeLauncher(results, new_jobs)
    sweeper.sweeper.launcher, sweeper.sweeper.config, sweeper.sweeper.hydra_context = launcher, cfg, cfg
    try:
        sweeper.sweep([])
    except KeyboardInterrupt:
        return launcher.order[:-1]
    return launcher.order


def test_a_continued_search_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    straight = search(tmp_path, 14, results := {})
    assert len({*straight}) == 14
    assert None in results.values()  # so that a failed trial is among them
    stored: dict[tuple[str, ...], float | None] = {}
    assert search(tmp_path, 14, stored, new_jobs=5) == straight[:5]
    assert search(tmp_path, 9, stored, new_jobs=3) == straight[:8]
    assert search(tmp_path, 9, stored) == straight[:9]
    assert search(tmp_path, 14, stored) == straight
    assert stored == results


def test_runs_for_comparison_have_neither_searched_keys_nor_defense() -> None:
    searched = ["optim.lr", "optim.steps", "lora.r", "harmful_ratio"]
    job = ["sweep=attack", "experiment=smoke", "method=lisa", "method.rho=2", "align=vaccine", "++align.method.rho=1"]
    job += ["repair=safe_lora", "data.n=50", "optim.lr=0.1", "harmful_ratio=0.3", "align.optim.lr=0.2"]
    default = _compared_overrides(job, searched, "default")
    assert default == [line for line in job if not line.startswith(("optim.", "harmful_ratio"))]
    undefended = _compared_overrides(job, searched, "undefended")
    assert undefended[:4] == ["sweep=attack", "experiment=smoke", "data.n=50", "align.optim.lr=0.2"]
    assert {"method=sft", "align=sft", "curate=none", "repair=none", "harmful_ratio=0"} <= {*undefended[4:]}
    assert all(line.startswith(("attack=none", "filter=none")) for line in undefended[9:])


@pytest.mark.parametrize("line", ["method=sft,lisa", "seed=1,2", "align=choice(sft,vaccine)"])
def test_one_search_is_of_one_defense(line: str) -> None:
    with pytest.raises(UserError, match="Fix: one command for each"):
        resolve_sweep_dir(["-m", "sweep=attack", line])
    assert resolve_sweep_dir(["-m", "sweep=harmful_ratio", line])[1] is not None


def test_a_search_on_all_weights_has_no_rank() -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UserError, match=r"the search varies lora\.r.*Fix: sweep=attack_full"):
        resolve_sweep_dir(["-m", "sweep=attack", "lora=null"])
    with pytest.raises(UserError, match="Fix: one command for each"):
        resolve_sweep_dir(["-m", "sweep=attack_full", "seed=1,2"])
    assert resolve_sweep_dir(["-m", "sweep=attack_full", "lora=null"])[1] is not None
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        rank, full = (compose("config", [f"sweep={name}"], return_hydra_config=True) for name in ATTACKERS)
    assert rank.lora.r > 0
    assert full.lora is None
    assert [*rank.hydra.sweeper.params] == ["optim.lr", "optim.steps", "lora.r", "harmful_ratio"]
    assert [*full.hydra.sweeper.params] == ["optim.lr", "optim.steps", "harmful_ratio"]
    for cfg in (rank, full):
        del cfg.hydra.sweeper.params
    assert rank.hydra.sweeper == full.hydra.sweeper
    assert rank.sweep == full.sweep


def test_another_objective_has_another_folder() -> None:
    folders = [
        resolve_sweep_dir(["-m", "sweep=attack", "experiment=smoke", *more])[1]
        for more in ([], ["sweep.value=defender"], ["sweep.retain=0.5"])
    ]
    assert len({*folders}) == 3
    assert folders[0] == Path("multirun/smoke/attack")


@pytest.mark.slow
def test_an_unknown_metric_is_refused_before_a_second_training(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ["experiment=smoke", "sweep=optuna", f"hydra.sweep.dir={tmp_path}", "sweep.value='final/acuracy'"]
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "metrics.json").write_text(json.dumps({"final/accuracy": 1.0, "time/total_s": 1.0}))
    (tmp_path / "next").mkdir()
    assert run_job(composed_job([*words, "hydra.job.num=1"], tmp_path / "next")) is None
    cause = json.loads((tmp_path / "next/failed.json").read_text())["cause"]
    assert "have no metric final/acuracy; did you mean final/accuracy" in cause
    (trial,) = read_trials(tmp_path)
    assert (trial.number, trial.job, trial.value) == (1, "next", None)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", ATTACKERS)
def test_an_attack_on_a_tiny_model(tmp_path: Path, forked: Forked, sweep: str) -> None:
    pytest.importorskip("optuna")
    words = ["-m", "experiment=smoke", f"sweep={sweep}", "align.optim.steps=4", "optim.steps=choice(2,4)"]

    def attack(trials: int) -> str:
        environment = {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        done = forked.run([*words, f"hydra.sweeper.n_trials={trials}", "hydra.sweep.dir=s"], tmp_path, environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    attack(2)
    first = read_trials(tmp_path / "s")
    times = {f: f.stat().st_mtime_ns for f in (tmp_path / "s").rglob("metrics.json")}
    output = attack(3)
    trials = read_trials(tmp_path / "s")
    assert [(t.number, t.job, t.value) for t in trials[:2]] == [(t.number, t.job, t.value) for t in first]
    assert [t.planned for t in trials] == [3] * 3
    assert all(f.stat().st_mtime_ns == time for f, time in times.items())
    metrics = {
        name: json.loads((tmp_path / "s" / name / "metrics.json").read_text()) for name in ("default", "undefended")
    }
    objective = Objective("attacker", 0.9, metrics["undefended"]["final/accuracy"])
    for trial in trials:
        assert trial.objective == objective
        run = tmp_path / "s" / trial.job
        assert trial.value == search_value(objective, json.loads((run / "metrics.json").read_text()), run)
    choices = json.loads((tmp_path / "s/undefended/choices.json").read_text())
    assert (choices["method"], choices["align"]) == ("sft", "sft")
    assert json.loads((tmp_path / "s/default/choices.json").read_text())["method"] == "lisa"
    assert "search  lisa: trials 3 of 3" in output
    assert "An attacker who tunes" in (tmp_path / "s/report.html").read_text()
