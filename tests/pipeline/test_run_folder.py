"""A run's folder: one owner, files that are complete or absent, and an end that is recorded last."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from helpers.forking import Forked, run
from helpers.paths import ROOT
from lisa_lightning.evaluation.evaluator import Answer, read_answers, write_answers
from lisa_lightning.pipeline.request import Request
from lisa_lightning.pipeline.run_folder import prepare_folder
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import drop_unused, folder_lock
from lisa_lightning.runtime.run_files import is_complete, read_metrics


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A full disk ends a run in one sentence, and no file is left half-written.

    A limit on the size of files stands in for the disk: writing beyond it fails as a full disk does.
    """
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", limited, str(ROOT / "run.py"), "experiment=smoke", "hydra.run.dir=out"]
    env = os.environ | {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.part*"))


@pytest.mark.slow
def test_a_folder_that_holds_a_run_is_not_overwritten(forked: Forked, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    (tmp_path / "out" / "overrides.yaml").write_text("- seed=1")  # what `resume=true` must be given again
    done = run(forked, tmp_path, "experiment=smoke", "hydra.run.dir=out")
    assert done.returncode == 2
    assert "holds a run; add resume=true" in done.stderr
    assert (tmp_path / "out" / "metrics.json").read_text() == "{}"
    assert (tmp_path / "out" / "overrides.yaml").read_text() == "- seed=1"


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(forked: Forked, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "out"):
        done = run(forked, tmp_path, "experiment=smoke", "hydra.run.dir=out")
        assert (done.returncode, "out is another run's, which is still running" in done.stderr) == (2, True)
        assert (tmp_path / "out").exists()  # though the refused one left nothing in it
    with folder_lock(tmp_path / "out"), pytest.raises(UserError, match="another run's"), folder_lock(tmp_path / "out"):
        pass
    drop_unused(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_terminated_run_is_no_success_and_goes_on(forked: Forked, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "cache")}
    own = ["experiment=smoke", "optim.steps=80", "evaluate.every=0", "checkpoint.every=2", "hydra.run.dir=out"]
    process = forked.start(own, tmp_path, env)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/checkpoints/finetune.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process, signal.SIGTERM)
    ended = forked.wait(process)
    assert (ended.returncode, "Stopped by SIGTERM" in ended.stderr) == (128 + signal.SIGTERM, True)
    assert forked.run([*own, "resume=true"], tmp_path, env).returncode == 0


@pytest.mark.slow
def test_a_cache_that_moved_and_a_run_that_did_not_end_are_told(forked: Forked, tmp_path: Path) -> None:
    run(forked, tmp_path, "experiment=smoke", "hydra.run.dir=one", "cache_dir=cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    done = run(forked, tmp_path, "experiment=smoke", "hydra.run.dir=two", "cache_dir=moved")
    assert (done.returncode, (tmp_path / "two" / "checkpoints").exists()) == (0, False)
    base = Path(
        json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    assert base.parent == tmp_path / "moved" / "align"
    assert (base / "model.safetensors").exists()
    metrics = read_metrics(tmp_path / "two")
    for said, kept in ((False, metrics), (True, {k: v for k, v in metrics.items() if k != "time/total_s"})):
        (tmp_path / "two" / "metrics.json").write_text(json.dumps(kept))
        (tmp_path / "two" / "checksums.json").unlink()
        again = run(forked, tmp_path, "stages=[judge]", "judge=refusal", "hydra.run.dir=two", "cache_dir=moved")
        assert ("is not finished: answers may be missing" in again.stdout + again.stderr) == said


def test_a_run_that_goes_on_is_not_at_its_end(tmp_path: Path, config: Callable[..., DictConfig]) -> None:
    cfg = config("experiment=smoke", "resume=true")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    (tmp_path / "overrides.yaml").write_text("")
    (tmp_path / "metrics.json").write_text(json.dumps({"final/accuracy": 90.0, "time/total_s": 9.0}))
    assert is_complete(read_metrics(tmp_path))
    prepare_folder(Request(config("experiment=smoke", "resume=true", "judge=refusal"), tmp_path, {}))
    assert read_metrics(tmp_path) == {"final/accuracy": 90.0}
    assert not is_complete(read_metrics(tmp_path))


def test_answers_that_end_in_half_a_character_are_read_to_the_line_before(tmp_path: Path) -> None:
    path, answers = tmp_path / "responses.jsonl", [Answer("final", "harmful", i, "p", "", "’", "") for i in range(2)]
    write_answers(path, answers)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("’".encode()) + 1])
    assert read_answers(path) == answers[:1]
