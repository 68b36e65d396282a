"""Scores of lm-evaluation-harness: read from its results, written to metrics.json and read again."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lisa_lightning.config.settings import Evaluate
from lisa_lightning.evaluation import harness
from lisa_lightning.evaluation.harness import load_harness
from lisa_lightning.evaluation.scores import read_scores, score_metrics
from lisa_lightning.evaluation.utility import UtilityScore, read_utility, utility_scores
from lisa_lightning.report.score_table import ScoreRow, utility_rows
from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.runtime.errors import UserError

RESULTS: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "name": "gsm8k",
        "alias": "gsm8k",
        "sample_len": 4,
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.2,
        "exact_match,flexible-extract": 0.5,
        "exact_match_stderr,flexible-extract": "N/A",
    },
    "mmlu": {"alias": "mmlu", "acc,none": 0.4, "acc_stderr,none": 0.01},
    "mmlu_law": {"alias": "law", "acc,none": 0.3, "acc_stderr,none": float("nan")},
}


def test_a_metric_is_named_after_its_filter() -> None:
    assert utility_scores("final", "gsm8k", RESULTS) == [
        UtilityScore("final", "gsm8k", "exact_match_strict-match", 0.25, 0.2),
        UtilityScore("final", "gsm8k", "exact_match_flexible-extract", 0.5),
    ]


def test_a_group_has_one_score_and_a_tag_those_of_its_tasks() -> None:
    assert utility_scores("final", "mmlu", RESULTS) == [UtilityScore("final", "mmlu", "acc", 0.4, 0.01)]
    scores = utility_scores("final", "a_tag", {name: RESULTS[name] for name in ("mmlu", "mmlu_law")})
    assert [(s.task, s.value, s.stderr) for s in scores] == [("mmlu", 0.4, 0.01), ("mmlu_law", 0.3, None)]


def test_scores_are_read_from_metrics_and_mistaken_for_no_judges_score() -> None:
    scores = [*utility_scores("aligned", "gsm8k", RESULTS), *utility_scores("final", "mmlu", RESULTS)]
    metrics: dict[str, Any] = {"time/lm_eval_s": 3.0, "final/embedded/harmful_score": 5.0}
    for score in scores:
        metrics |= score.entries
    assert metrics["final/lm_eval/mmlu/acc_stderr"] == 0.01
    assert read_utility(json.loads(json.dumps(metrics))) == scores
    assert {score.metric for score in read_scores(metrics)} == {"harmful_score"}
    assert not {name for name in score_metrics(read_scores(metrics)) if "lm_eval" in name}


def test_a_row_has_both_models_and_their_difference() -> None:
    scores = [UtilityScore("aligned", "t", "acc", 0.5, 0.1), UtilityScore("final", "t", "acc", 0.25)]
    columns = {"aligned": "before", "final": "after"}
    assert utility_rows(scores, columns) == [ScoreRow("t", "acc", [("0.500", "± 0.100"), ("0.250", "")], "−0.250")]
    assert utility_rows(scores[:1], columns)[0].values[1] == ("–", "")


def test_a_sweep_shows_means_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, values in (("lisa", (0.2, 0.4)), ("sft", (0.5,))):
        for seed, value in enumerate(values):
            run = tmp_path / f"{method}-{seed}"
            run.mkdir()
            settings = {"seed": seed, "method": {"name": method}, "stages": ["finetune", "evaluate"]}
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
            (run / "choices.json").write_text(json.dumps({"method": method}))
            metrics = {"aligned/lm_eval/t/acc": 0.9, "final/lm_eval/t/acc": value, "final/lm_eval/t/acc_stderr": 0.1}
            (run / "metrics.json").write_text(json.dumps(metrics | {"time/total_s": 1.0, "final/accuracy": 50.0}))
    assert write_sweep([tmp_path], tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "general utility by lm-evaluation-harness" in printed
    assert "0.300 ± 0.141" in printed
    page = (tmp_path / "report.html").read_text()
    assert '<th scope="row">lisa</th><td>2</td><td>0.300 ± 0.141</td>' in page
    assert '<th scope="row">sft</th><td>1</td><td>0.500</td>' in page
    assert "final/lm_eval/t/acc_stderr" in (tmp_path / "sweep.csv").read_text()


def test_a_run_without_tasks_does_not_ask_for_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert load_harness(Evaluate()) is None
    with pytest.raises(UserError, match=r"^evaluate.lm_eval=\[gsm8k,ifeval\]: .* Fix: pip install 'lisa-lightning\[ev"):
        load_harness(Evaluate(lm_eval=["gsm8k", "ifeval"]))
