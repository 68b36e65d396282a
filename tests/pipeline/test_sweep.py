"""Multiruns: jobs that are found again, failures that end one job alone, launchers, and what is left at the end."""

import csv
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from safetensors.torch import load_file

from helpers.composing import composed_job
from helpers.forking import Forked, started
from helpers.paths import ROOT
from lisa_lightning.config.validate import check
from lisa_lightning.pipeline.search import defender_value
from lisa_lightning.pipeline.sweep import resolve_sweep_dir, run_job
from lisa_lightning.report.search_trials import read_trials
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import folder_lock

SMALL = ["experiment=smoke", "optim.steps=6", "align.optim.steps=4", "evaluate.every=0", "checkpoint.every=2"]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["-m", "sweep=rho", "experiment=sst2_lisa"], "multirun/sst2_lisa/rho"),
        (["-m", "sweep=rho", "experiment=sst2_lisa", "resume=true", "wandb.project=x"], "multirun/sst2_lisa/rho"),
        (["-m", "sweep=rho", "experiment=sst2_lisa", "checkpoint.every=9"], "multirun/sst2_lisa/rho"),
        (["-m", "sweep=rho", "experiment=sst2_lisa", "optim.lr=1"], "multirun/sst2_lisa/rho,optim.lr=1"),
        (["--multirun", "seed=2,1", "method=sft,bso"], "multirun/method,seed"),
        (["-m", "method=sft,bso,lisa", "seed=1,2", "optim.steps=9"], "multirun/method,seed,optim.steps=9"),
        (["-m", "experiment=sst2_sft,sst2_lisa"], "multirun/experiment"),
        (["-m", "experiment=smoke"], "multirun/smoke/one"),
        (["-m", "seed=1,2", "source.train.path=a/b c"], "multirun/seed,source.train.path=a_b_c"),
        (["-m", "seed=1,2", "hydra.sweep.dir=here"], "here"),
    ],
)
def test_the_same_sweep_has_the_same_folder(arguments: list[str], folder: str) -> None:
    resolved, sweep_dir = resolve_sweep_dir(arguments)
    assert sweep_dir == Path(folder)
    assert resolved[: len(arguments)] == arguments


def test_a_jobs_name_says_what_its_folder_does_not() -> None:
    named = "hydra.job.config.override_dirname.exclude_keys"
    both = ["-m", "experiment=smoke", "seed=1,2", "optim.lr=1", "resume=true"]
    assert resolve_sweep_dir(both)[0][-1] == f"{named}=[experiment,optim.lr,resume]"
    assert (
        resolve_sweep_dir([*both, "hydra.sweep.dir=here"])[0][-1]
        == f"{named}=[resume,hydra.sweep.dir,experiment,sweep]"
    )
    assert resolve_sweep_dir(["-m", "experiment=smoke"])[0][-1] == "hydra.sweep.subdir=job"
    assert resolve_sweep_dir(["-m", "experiment=smoke", "hydra.sweep.dir=here"])[0][-1] == "hydra.sweep.subdir=job"
    assert resolve_sweep_dir(["-m", "--config-dir", "mine", "seed=1,2"])[1] == Path("multirun", "seed")
    assert resolve_sweep_dir(["-m", "seed=1", "hydra.sweep.dir=here"])[0][-1].startswith(
        named
    )  # another seed may follow


def test_a_folder_must_be_known_before_the_config() -> None:
    with pytest.raises(UserError, match="must be written out"):
        resolve_sweep_dir(["-m", "seed=1,2", "hydra.sweep.dir=${oc.env:HOME}/s"])


def test_what_is_no_sweep_is_left_alone() -> None:
    for arguments in (["seed=1"], ["-m", "--cfg", "job"], ["-m", "a=[1,"]):
        assert resolve_sweep_dir(arguments) == (arguments, None)


SEARCHES = ("attack", "attack_full", "optuna")
SWEEPS = sorted(f.stem for f in (ROOT / "conf/sweep").glob("[!_]*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_every_job_of_a_committed_sweep_is_a_run(config: Callable[..., DictConfig], name: str) -> None:
    content = yaml.safe_load((ROOT / "conf/sweep" / f"{name}.yaml").read_text())
    params = content["hydra"]["sweeper"]["params"]
    overrides = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])
    assert name in SEARCHES or params["seed"] == "1,2,3"
    ends: list[list[str]] = [[], []]
    for o in overrides:
        values = [str(v) for v in o.sweep_string_iterator()] if o.is_discrete_sweep() else ["0.01", "10"]
        ends = [[*ends[0], f"{o.get_key_element()}={values[0]}"], [*ends[1], f"{o.get_key_element()}={values[-1]}"]]
    split = [] if "split" not in params else ["split=[0,30]"]
    for end in ends:
        check(config(f"sweep={name}" if name not in SEARCHES else "sweep=rho", *split, *end))


@pytest.mark.slow
def test_a_sweep_of_weights_and_biases_starts_runs_of_ours(config: Callable[..., DictConfig]) -> None:
    sweep = yaml.safe_load((ROOT / "conf/wandb_sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists()
    assert sweep["command"] == ["${env}", "python", "${program}", "${args_no_hyphens}"]
    values = [(k, v.get("values", [v.get("value")])) for k, v in sweep["parameters"].items()]
    for end in (0, -1):
        check(config(*(f"{key}={options[end]}" for key, options in values)))


WIN_RATE = ["judge.win_rate.model=m", *(f"judge.win_rate.usd_per_million_{side}=1" for side in ("input", "output"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["judge=refusal"], "judge=[refusal], task=sst2 and"),
        (["judge=[refusal,win_rate]", *WIN_RATE], "judge=[refusal,win_rate], task=sst2 and"),
        (["task=alpaca"], "judge=[embedded], task=alpaca and"),
        (["stages=[align,evaluate,judge]"], "stages=[align,evaluate,judge] give"),
    ],
)
@pytest.mark.parametrize("sweep", SEARCHES)
def test_no_study_is_led_by_one_score_alone(tmp_path: Path, sweep: str, overrides: list[str], named: str) -> None:
    pytest.importorskip("optuna")
    (job := tmp_path / "job").mkdir()
    words = ["experiment=smoke", f"sweep={sweep}", f"hydra.sweep.dir={tmp_path}", "hydra.job.num=0", *overrides]
    assert run_job(composed_job(words, job)) is None
    cause = json.loads((job / "failed.json").read_text())["cause"]
    assert named in cause
    assert "no accuracy minus harmful score" in cause
    assert [f.name for f in job.iterdir()] == ["failed.json"]  # refused before anything was run
    assert {f.name for f in tmp_path.iterdir()} == {"job", "trials"}


def test_a_missing_score_is_no_score_of_0() -> None:
    assert defender_value({"final/accuracy": 90.0, "final/harmful_score": 9.0}) == 81.0
    assert defender_value({"final/accuracy": 90.0}) is defender_value({"final/harmful_score": 9.0}) is None


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


Sweep = Callable[..., str]


def settings(work: Path) -> dict[str, str]:
    return {"WANDB_MODE": "disabled", "LISA_CACHE": str(work / "cache"), "HOME": str(work)}


@pytest.fixture(scope="module")
def sweep(work: Path, forked: Forked) -> Sweep:
    """Return `sweep(arguments...)`, which runs `run.py -m` in a fork and returns its output."""

    def command(*arguments: str, status: int = 0) -> str:
        done = forked.run(["-m", *arguments], work, settings(work))
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout

    return command


def jobs(folder: Path) -> dict[str, dict[str, str]]:
    """Return the line of sweep.csv of each job, by the job's folder."""
    with (folder / "sweep.csv").open(newline="") as file:
        return {row["folder"]: row for row in csv.DictReader(file)}


def written(folder: Path) -> dict[str, int]:
    return {f.parent.name: f.stat().st_mtime_ns for f in folder.glob("*/metrics.json")}


@pytest.mark.slow
def test_a_failure_ends_one_job_and_the_same_command_repeats_it_alone(work: Path, sweep: Sweep) -> None:
    arguments = [*SMALL, "method=sft,lisa", "data.n=60,4000", "seed=1"]
    said = sweep(*arguments, status=1)
    folder = next((work / "multirun/smoke").iterdir())
    found = jobs(folder)
    assert {name: row["status"] for name, row in found.items()} == {
        "data.n=60,method=lisa": "finished",
        "data.n=60,method=sft": "finished",
        "data.n=4000,method=lisa": "failed",
        "data.n=4000,method=sft": "failed",
    }
    cause = "data.n=4000 with harmful_ratio=0.1 needs 3600 task rows"
    assert found["data.n=4000,method=sft"]["cause"].startswith(cause)
    assert said.rpartition("failed  2")[2].count(cause) == 1  # with the two jobs that it ended
    page = (folder / "report.html").read_text()
    assert cause in page
    assert 'href="data.n%3D60%2Cmethod%3Dlisa/report.html"' in page
    before = written(folder)
    (folder / "data.n=60,method=sft" / "metrics.json").unlink()
    sweep(*arguments, status=1)
    after = written(folder)
    assert after["data.n=60,method=lisa"] == before["data.n=60,method=lisa"]
    assert after["data.n=60,method=sft"] != before["data.n=60,method=sft"]
    sweep(*arguments[:-2], "data.n=60", "seed=1", "hydra.sweep.dir=other")
    assert {row["status"] for row in jobs(work / "other").values()} == {"finished"}


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(work: Path, sweep: Sweep, forked: Forked) -> None:
    arguments = [*SMALL, "optim.steps=30", "method=bso,lisa", "seed=7", "align.seed=1"]
    straight = work / "straight"
    sweep(*arguments, f"hydra.sweep.dir={straight}")
    shutil.rmtree(work / "cache" / "finetune")
    killed = work / "killed"
    process = forked.start(["-m", *arguments, f"hydra.sweep.dir={killed}"], work, settings(work))
    deadline = time.monotonic() + 120
    while not list(killed.glob("*method=lisa*/checkpoints/finetune.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    assert forked.wait(process).returncode == -signal.SIGKILL
    (first,) = killed.glob("*/metrics.json")
    assert "method=bso" in str(first)
    before = first.stat().st_mtime_ns
    sweep(*arguments, f"hydra.sweep.dir={killed}")
    assert first.stat().st_mtime_ns == before
    assert [row["status"] for row in jobs(killed).values()] == ["finished"] * 2
    for name in ("method=bso", "method=lisa"):
        files = [next(f.glob(f"*{name}*/adapter/adapter_model.safetensors")) for f in (straight, killed)]
        a, b = map(load_file, files)
        assert all(bool((a[key] == b[key]).all()) for key in a)


@pytest.mark.slow
def test_a_job_that_another_process_runs_is_left_to_it(work: Path, sweep: Sweep) -> None:
    arguments = [*SMALL, "seed=1,2", "hydra.sweep.dir=shared"]
    sweep(*arguments)
    (work / "shared" / next(iter(jobs(work / "shared"))) / "metrics.json").unlink()
    with folder_lock(work / "shared" / next(iter(jobs(work / "shared")))):
        sweep(*arguments)
    assert [row["status"] for row in jobs(work / "shared").values()] == ["unfinished", "finished"]


@pytest.mark.slow
def test_jobs_that_start_together_align_once_and_a_killed_owner_blocks_nobody(work: Path, forked: Forked) -> None:
    own = [*SMALL, "align.optim.steps=40", "align.seed=3", "optim.steps=2"]

    def start(name: str) -> int:
        return forked.start([*own, f"hydra.run.dir={name}", f"seed={name[-1]}"], work, settings(work))

    owner = start("owner1")
    deadline = time.monotonic() + 120
    while not (work / "owner1/checkpoints/align.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    others = [start("other2"), start("other3")]
    os.kill(owner, signal.SIGKILL)
    assert forked.wait(owner).returncode == -signal.SIGKILL
    assert [forked.wait(process).returncode for process in others] == [0, 0]
    made = [name for name in ("other2", "other3") if (work / name / "checkpoints/align.ckpt").exists()]
    assert len(made) == 1


@pytest.mark.slow
def test_processes_of_one_machine_share_its_threads(work: Path) -> None:
    both = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=joblib"]
    started(["-m", *SMALL, "seed=1,2", *both], work, settings(work) | {"OMP_NUM_THREADS": ""})
    found = jobs(work / "joblib")
    assert [(row["seed"], row["status"]) for row in found.values()] == [("1", "finished"), ("2", "finished")]
    assert {row["threads"] for row in found.values()} == {str(max(1, (os.cpu_count() or 1) // 2))}


@pytest.mark.slow
def test_a_cluster_runs_the_jobs(work: Path, sweep: Sweep) -> None:
    local = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.sweep.dir=cluster"]
    sweep(*SMALL, "seed=1,2", *local)
    assert {row["status"] for row in jobs(work / "cluster").values()} == {"finished"}


@pytest.mark.slow
def test_several_processes_a_job_are_refused_with_the_ways_out(work: Path, sweep: Sweep) -> None:
    said = sweep(*SMALL, "trainer=ddp", "trainer.devices=2", "seed=1,2", "hydra.sweep.dir=ddp", status=1)
    assert "each of its 2 processes would start the whole sweep again" in said
    for way in ("trainer.devices=1", "hydra/launcher=submitit_slurm", "one command a job"):
        assert way in said
    assert not list((work / "ddp").glob("*/curves.csv"))


@pytest.mark.slow
def test_judging_alone_is_no_job_of_a_sweep(sweep: Sweep) -> None:
    said = sweep("experiment=smoke", "stages=[judge]", "judge=refusal,embedded", "hydra.sweep.dir=judging", status=1)
    assert "judge=[ONE,OTHER] asks several judges at once" in said


@pytest.mark.slow
def test_a_study_looks_for_the_best_and_goes_on(work: Path, sweep: Sweep) -> None:
    pytest.importorskip("optuna")
    for count in (1, 2, 2):
        sweep(*SMALL, "sweep=optuna", f"hydra.sweeper.n_trials={count}", "hydra.sweep.dir=study")
        trials = read_trials(work / "study")
        assert [trial.number for trial in trials] == [*range(count)]
    metrics = [json.loads((work / "study" / trial.job / "metrics.json").read_text()) for trial in trials]
    assert [t.value for t in trials] == [m["final/accuracy"] - m["final/harmful_score"] for m in metrics]
    assert len(list((work / "study").glob("*/metrics.json"))) == len({trial.job for trial in trials})
    sweep(*SMALL, "sweep=optuna", "hydra.sweeper.n_trials=1", "data.n=4000", "hydra.sweep.dir=study", status=1)
    assert [trial.value for trial in read_trials(work / "study")] == [None]
    said = sweep(*SMALL, "sweep=optuna", "hydra.sweeper.n_trials=1", "judge=refusal", "hydra.sweep.dir=blind", status=1)
    assert "failed  1" in said
    assert "give no accuracy minus harmful score" in said
    assert "Traceback" not in said
