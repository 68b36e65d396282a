"""Summaries of the runs of a sweep: settings, spreads over seeds, the table and the page."""

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import ttest_1samp

from helpers.forking import Forked
from lisa_lightning.pipeline.sweep import finalize_sweep
from lisa_lightning.report import sweep_page
from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.report.sweep_page import render_sweep_page, score_plots
from lisa_lightning.report.sweep_runs import format_value, read_runs, seed_groups, sort_key, swept_keys
from lisa_lightning.runtime.errors import UserError

CURVES = (
    "stage,step,user/loss,alignment/loss,proximal/drift\nfinetune,1,2.0,,0.1\nfinetune,2,1.0,,0.2\nfinetune,3,,1,0\n"
)


def made(folder: Path, score: float | None, method: str = "lisa", seed: int = 1, **config: Any) -> Path:
    """Write a run's folder, unfinished if there is no score, and return it."""
    run = folder / f"{method}-{seed}-{'-'.join(map(str, config.values()))}".replace("/", "_")
    run.mkdir(parents=True)
    own = {"rho": 1.0} if method == "lisa" else {}
    settings = {"seed": seed, "align": {"seed": seed}, "method": own | {"name": method}, "wandb": {"group": run.name}}
    settings["stages"] = ["align", "finetune", "evaluate", "judge"]
    (run / "config.yaml").write_text(yaml.safe_dump(settings | config))
    (run / "choices.json").write_text(json.dumps({"method": method, "task": "sst2", "experiment": run.name}))
    (run / "curves.csv").write_text(CURVES)
    if score is not None:
        scores = {
            "final/harmful_score": score,
            "final/harmful_score_low": score - 1,
            "final/harmful_score_high": score + 1,
        }
        metrics = scores | {
            "final/accuracy": 90.0,
            "time/total_s": 9.0,
            "time/finetune_s": 6.0,
            "code": "a",
            "seed": seed,
        }
        (run / "metrics.json").write_text(json.dumps(metrics))
    return run


def test_settings_are_what_differs_beside_the_seed(tmp_path: Path) -> None:
    for method in ("sft", "lisa"):
        for ratio in (0.1, 0.05):
            for seed in (1, 2):
                own = {"repair": {"seed": seed}} if method == "lisa" else {}
                made(tmp_path, 10.0 * seed, method, seed, harmful_ratio=ratio, **own)
    runs = read_runs([tmp_path])
    # Lisa's rho follows from the method, other seeds from the seed.
    assert swept_keys(runs) == (["method", "harmful_ratio"], [])
    groups = seed_groups(runs, swept_keys(runs)[0])
    assert [g.values for g in groups] == [(m, r) for m in ("lisa", "sft") for r in ("0.05", "0.1")]
    assert all(len(g.runs) == 2 for g in groups)


def test_what_wandb_keeps_in_a_runs_folder_is_no_run(tmp_path: Path) -> None:
    run = made(tmp_path, 10.0)
    (run / "wandb" / "run-1" / "files").mkdir(parents=True)
    (run / "wandb" / "run-1" / "files" / "config.yaml").write_text("seed: {value: 1}")
    assert [found.folder for found in read_runs([tmp_path])] == [run]


def test_means_of_other_settings_are_not_joined_by_a_line(tmp_path: Path) -> None:
    for method in ("sft", "lisa", "bso"):
        for lr in (0.1, 0.2, 0.3):
            for ratio in (0.1, 0.2, 0.3):
                made(tmp_path, 10.0, method, harmful_ratio=ratio, lr=lr)
    runs = read_runs([tmp_path])
    keys, _ = swept_keys(runs)
    plots = {plot.name: plot for plot in score_plots(seed_groups(runs, keys), keys)}
    means = [line for name in plots for line in plots[name].lines if line.label and len(line.points) > 2]
    assert len(means) == 6 * 2  # a key and method each, of harmful score and accuracy
    assert {line.dash for line in means} == {""}


def test_models_asked_as_they_are_stand_side_by_side(tmp_path: Path) -> None:
    for name, score in (("before", 10.0), ("after", 60.0)):
        run = made(tmp_path, score, model={"id": name}, stages=["evaluate", "judge"], harmful_ratio=0.1)
        own = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps({k.replace("final/", "aligned/"): v for k, v in own.items()}))
    runs = read_runs([tmp_path])
    assert swept_keys(runs) == (["method", "model"], [])
    spreads = [(g.values, g.spread("harmful_score")) for g in seed_groups(runs, swept_keys(runs)[0])]
    assert [(values, s.mean, s.low) for values, s in spreads if s] == [
        (("–", "after"), 60.0, 59.0),
        (("–", "before"), 10.0, 9.0),
    ]
    facts = (
        render_sweep_page(runs, *swept_keys(runs), tmp_path).partition('<dl class="facts">')[2].partition("</dl>")[0]
    )
    assert re.findall("<dt>(.*)</dt><dd>(.*)</dd>", facts) == [("task", "sst2")]  # nothing of fine-tuning


def test_coupled_keys_are_one(tmp_path: Path) -> None:
    for k1, k2 in ((10, 40), (25, 25)):
        made(tmp_path, 1.0, split=[k1, k2], steps={"k1": k1, "k2": k2})
    assert swept_keys(read_runs([tmp_path])) == (["method", "split"], ["steps.k1", "steps.k2"])
    assert format_value([10, 40]) == "10/40"


def test_what_differs_with_the_method_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that varies with the method is reported.

    Any key of two runs follows from any other, and the effect may be either's.
    """
    for method, lr in (("sft", 1e-3), ("lisa", 1e-4)):
        made(tmp_path, 10.0, method, optim={"lr": lr})
    assert write_sweep([tmp_path], tmp_path) == 0
    assert "varied  together with these settings: optim.lr\n" in capsys.readouterr().out
    assert (
        "These keys vary together with the settings of the table, so an effect may be theirs: <code>optim.lr</code>."
        in (tmp_path / "report.html").read_text()
    )
    with (tmp_path / "sweep.csv").open() as file:
        assert {(r["method"], r["optim.lr"]) for r in csv.DictReader(file)} == {("sft", "0.001"), ("lisa", "0.0001")}


def test_scores_of_other_judges_are_not_averaged(tmp_path: Path) -> None:
    for seed, judges in enumerate((["embedded"], ["embedded", "refusal"], ["refusal", "embedded"], None)):
        run = made(tmp_path, 10.0, seed=seed, judge={"embedded": {"x": 1}})
        if judges is not None:
            metrics = json.loads((run / "metrics.json").read_text())
            (run / "metrics.json").write_text(json.dumps(metrics | {"judges": judges}))
    keys, _ = swept_keys(runs := read_runs([tmp_path]))
    assert keys == ["method", "judge"]
    counted = {group.values: len(group.runs) for group in seed_groups(runs, keys)}
    assert counted == {("lisa", "embedded"): 3, ("lisa", "refusal,embedded"): 1}


@pytest.mark.slow
def test_a_mean_of_unlike_runs_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, rows in enumerate(("same", "same", "other")):
        run = made(tmp_path, 10.0, seed=seed, method="sft" if rows == "other" else "lisa")
        metrics = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps(metrics | {"inputs": rows}))
    write_sweep([tmp_path], tmp_path)
    assert "unequal over seeds" not in capsys.readouterr().out
    assert "runs that differ in more than the seed" not in (tmp_path / "report.html").read_text()
    made(tmp_path, 12.0, seed=4)  # which says nothing of its rows
    write_sweep([tmp_path], tmp_path)
    assert "unequal over seeds: rows, base model or custom classes\n" in capsys.readouterr().out
    assert "runs that differ in more than the seed: rows, base model" in (tmp_path / "report.html").read_text()


def test_a_spread_is_students_over_seeds_with_that_over_answers_and_a_runs_own_of_one(tmp_path: Path) -> None:
    values = [10.0, 14.0, 30.0]
    for seed, value in enumerate(values):
        made(tmp_path, value, seed=seed)
        made(tmp_path, 100 - value, seed=seed, method="bso")
    made(tmp_path, 50.0, method="sft")
    runs = read_runs([tmp_path])
    spreads = {g.values[0]: g.spread("harmful_score") for g in seed_groups(runs, swept_keys(runs)[0])}
    high, three, one = (spreads[name] for name in ("bso", "lisa", "sft"))
    assert high is not None
    assert three is not None
    assert one is not None
    assert (high.low, high.high) == pytest.approx((100 - three.high, 100.0))
    student = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (three.mean, three.high) == pytest.approx((18.0, 18 + math.hypot(student.high - 18, 1)))
    assert three.low == max(0.0, 18 - math.hypot(18 - student.low, 1))
    assert three.deviation == pytest.approx(10.5830052)
    assert (one.mean, one.deviation, one.low, one.high) == (50.0, None, 49.0, 51.0)


def test_runs_that_agree_are_not_certain_and_a_seed_counts_once(tmp_path: Path) -> None:
    for seed in (1, 2):
        made(tmp_path / "a", 50.0, seed=seed)
    made(tmp_path / "b", 50.0, seed=2)
    runs = read_runs([tmp_path, tmp_path / "a", tmp_path / "b" / ".." / "b"])
    assert len(runs) == 3
    (group,) = seed_groups(runs, swept_keys(runs)[0])
    spread = group.spread("harmful_score")
    assert spread is not None
    assert (len(group.runs), spread.deviation, spread.low, spread.high) == (2, 0.0, 49.0, 51.0)


def test_values_stand_in_their_order() -> None:
    assert sorted(["10", "1e-05", "0.3", "b", "a", "5/45", "25/25"], key=sort_key) == [
        "1e-05", "0.3", "5/45", "10", "25/25", "a", "b",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_unfinished_sweep_has_a_table_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path, 20.0, harmful_ratio=0.1)
    made(tmp_path, None, harmful_ratio=0.2)
    broken = made(tmp_path, None, harmful_ratio=0.3)
    (broken / "failed.json").write_text(json.dumps({"cause": "<b>no</b> $x$", "traceback": ""}))
    assert write_sweep([tmp_path], tmp_path) == 1
    with (tmp_path / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["status"], r["harmful_ratio"], r["final/harmful_score"]) for r in rows] == [
        ("finished", "0.1", "20.0"), ("unfinished", "0.2", ""), ("failed", "0.3", ""),
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert "<b>no" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    said = capsys.readouterr().out
    assert "<b>no</b> $x$" in said
    assert "begun   1 run" in said
    noted = (broken / "failed.json").stat().st_mtime
    assert [finalize_sweep(tmp_path, since) for since in (noted - 1, noted + 1)] == [1, 0]  # an earlier command's


@pytest.mark.slow
def test_the_page_can_hide_every_run_that_it_draws(tmp_path: Path) -> None:
    for seed in (1, 2):
        for ratio in (0.1, 0.2):
            made(tmp_path, 20.0 * seed, seed=seed, harmful_ratio=ratio)
    assert write_sweep([tmp_path], tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    for run in range(4):
        assert f'id="show-{run}"' in page
        assert page.count(f'class="run-{run}"') == 2 * 3  # wide and narrow, three plots
        assert f":root:has(#show-{run}:not(:checked)) .run-{run}" in page
    for title in (
        "Harmful score against harmful_ratio",
        "Accuracy against harmful_ratio",
        "Harmful score against accuracy",
    ):
        assert title in page
    before = page, (tmp_path / "sweep.csv").read_text()
    write_sweep([tmp_path], tmp_path)
    assert ((tmp_path / "report.html").read_text(), (tmp_path / "sweep.csv").read_text()) == before


@pytest.mark.slow
def test_a_sweep_shows_refusal_rates_and_the_range_of_the_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, ratio, accuracy in ((1, 0.1, 61.68), (2, 0.1, 64.34), (1, 0.2, 63.0)):
        run = made(tmp_path, 20.0, seed=seed, harmful_ratio=ratio)
        scores = {"final/refusal_rate": 70.0, "baseline/majority_class": 53.0, "baseline/bag_of_words": accuracy}
        (run / "metrics.json").write_text(json.dumps(json.loads((run / "metrics.json").read_text()) | scores))
    assert write_sweep([tmp_path], tmp_path) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Refusal rate against harmful_ratio" in page
    for text in (page, capsys.readouterr().out):
        assert "Accuracy without a language model: majority class 53.0 %, bag of words 61.7 to 64.3 %." in text
    with (tmp_path / "sweep.csv").open() as file:
        assert [row["baseline/bag_of_words"] for row in csv.DictReader(file)] == ["61.68", "63.0", "64.34"]


def test_names_from_outside_stay_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("<i>a</i>", "$b$", "[red]"):
        made(tmp_path, 20.0, note=value)
    write_sweep([tmp_path], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<i>a" not in page
    assert "$b$" in page
    assert "[red]" in capsys.readouterr().out


@pytest.mark.slow
def test_several_folders_together_from_the_command_line(tmp_path: Path, forked: Forked) -> None:
    made(tmp_path / "one", 20.0, seed=1)
    made(tmp_path / "two", 30.0, seed=2)
    (tmp_path / "all").mkdir()
    done = forked.run(["../one", "../two"], tmp_path / "all", {}, "lisa_lightning.report")
    assert done.returncode == 0, done.stderr
    assert "25.0 ± 7.1" in done.stdout
    assert (tmp_path / "all/report.html").exists()
    empty = forked.run(["."], tmp_path, {}, "lisa_lightning.report")
    assert empty.returncode == 0
    none = forked.run(["all"], tmp_path, {}, "lisa_lightning.report")
    assert (none.returncode, none.stderr.strip()) == (
        2,
        "all: no run found. Fix: name the folder of a sweep or of a run",
    )


def test_a_single_runs_own_page_is_kept(tmp_path: Path) -> None:
    run = made(tmp_path, 20.0)
    with pytest.raises(UserError, match="is the folder of one run"):
        write_sweep([run], run)


def test_a_page_of_many_runs_says_what_it_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ratio in (0.1, 0.2, 0.3, 0.4):
        made(tmp_path, 100 * ratio, harmful_ratio=ratio)
    (tmp_path / "lisa-1-0.4" / "curves.csv").unlink()
    runs = read_runs([tmp_path])

    def page() -> str:
        return render_sweep_page(runs, *swept_keys(runs), tmp_path, [], [])

    whole = page()
    assert "The plots show" not in whole
    assert '<p class="soft">3 of the 4 runs have curves.</p>' in whole
    monkeypatch.setattr(sweep_page, "MAX_PLOTTED", 2)
    monkeypatch.setattr(sweep_page, "MAX_CURVES", 1)
    capped = page()
    assert "The plots show 2 of the 4 settings, evenly spaced in the order of the table below." in capped
    assert "3 of the 4 runs have curves. The page holds those of the first 1." in capped
    assert capped.count('id="show-') == 1
    assert len(capped) < len(whole)
    rows = [re.findall(r"<tr><th scope=\"row\">.*", text) for text in (whole, capped)]
    assert rows[0] == rows[1]  # tables have every setting and every run
