"""Runs with tasks of lm-evaluation-harness: metrics, the page, and a run that a task's error interrupts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.composing import composed
from helpers.paths import ROOT
from lisa_lightning.evaluation.harness import Harness
from lisa_lightning.evaluation.utility import read_utility
from lisa_lightning.pipeline.run import run
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.run_files import read_metrics

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

FOLDER = ROOT / "examples" / "lm_eval"
WORDS = ["experiment=smoke", "optim.steps=4", "align.optim.steps=2", "evaluate.every=0"]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of the example's rows begin at the root of a clone."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the tasks that models were evaluated on so far."""
    names: list[str] = []
    original = Harness.evaluate

    def recorded(self: Harness, *args: Any) -> Any:
        names.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(Harness, "evaluate", recorded)
    return names


def words(cache: Path, folder: Path, *tasks: str) -> list[str]:
    """Return the overrides of a run with tasks of a folder."""
    harness = [f"evaluate.lm_eval=[{','.join(tasks)}]", f"evaluate.lm_eval_folder={folder}", "evaluate.lm_eval_limit=8"]
    return [*WORDS, *harness, f"cache_dir={cache}"]


def test_a_run_measures_both_models_and_shows_them(
    tmp_path: Path, evaluated: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = words(tmp_path / "cache", FOLDER, "lisa_arithmetic")
    metrics = run(composed(overrides, tmp_path / "out"))
    name = "lm_eval/lisa_arithmetic/acc"
    assert {f"{model}/{name}{end}" for model in ("aligned", "final") for end in ("", "_stderr")} <= metrics.keys()
    assert 0 <= metrics[f"final/{name}"] <= 1
    assert metrics["time/lm_eval_s"] > 0
    assert len(read_utility(read_metrics(tmp_path / "out"))) == 2
    assert "general utility by lm-evaluation-harness" in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'<td role="cell">{metrics[f"final/{name}"]:.3f}<span' in page
    assert "General utility" in page
    assert evaluated == ["lisa_arithmetic"] * 2
    again = run(composed(overrides, tmp_path / "again"))
    assert evaluated == ["lisa_arithmetic"] * 2
    assert read_utility(again) == read_utility(metrics)
    # Judging again keeps them.
    judged = run(composed(["stages=[judge]", "judge=refusal", *overrides[:1]], tmp_path / "out"))
    assert read_utility(judged) == read_utility(metrics)


def test_an_interrupted_run_repeats_only_the_unfinished_task(
    tmp_path: Path, evaluated: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = yaml.safe_load((FOLDER / "arithmetic.yaml").read_text())
    for name in ("first", "second"):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name}))
    recorded = Harness.evaluate

    def interrupted(self: Harness, *args: Any) -> Any:
        if args[-1] == "second":
            raise KeyboardInterrupt
        return recorded(self, *args)

    overrides = words(tmp_path / "cache", folder, "first", "second")
    with monkeypatch.context() as patch:
        patch.setattr(Harness, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(composed(overrides, tmp_path / "out"))
    assert evaluated == ["first"]
    metrics = run(composed([*overrides, "resume=true"], tmp_path / "out"))
    assert evaluated == ["first", "second", "first", "second"]
    scores = {(score.model, score.task): score.value for score in read_utility(metrics)}
    assert scores["final", "first"] == scores["final", "second"]
    assert len(scores) == 4


def test_an_unknown_task_is_refused_before_a_model_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean lisa_arithmetic"):
        run(composed(words(tmp_path / "cache", FOLDER, "lisa_aritmetic"), tmp_path / "out"))
    assert not (tmp_path / "cache").exists()


def test_tasks_are_ignored_without_the_stage_evaluate(tmp_path: Path, evaluated: list[str]) -> None:
    overrides = [*words(tmp_path / "cache", FOLDER, "no_such"), "stages=[align]"]
    assert read_utility(run(composed(overrides, tmp_path / "out"))) == []
    assert evaluated == []
