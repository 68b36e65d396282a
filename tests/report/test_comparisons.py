"""Verdicts by prompt in the report of a sweep: intervals over seeds and prompts, paired differences, McNemar's test."""

from pathlib import Path

import pytest
from scipy.stats import binomtest

from helpers.judged_runs import PROMPTS, save_run
from lisa_lightning.evaluation.paired import seed_and_prompt_interval
from lisa_lightning.report.comparisons import Comparison, compare_settings, format_p
from lisa_lightning.report.run_verdicts import read_verdicts
from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.report.sweep_runs import read_runs, seed_groups, swept_keys


def first(count: int) -> list[bool]:
    return [i < count for i in range(150)]


def comparisons(*folders: Path) -> list[Comparison]:
    runs = read_runs(folders)
    keys, _ = swept_keys(runs)
    return compare_settings(seed_groups(runs, keys), keys, folders[0] if len(folders) == 2 else None)


def width(folder: Path) -> float:
    runs = read_runs([folder])
    (group,) = seed_groups(runs, swept_keys(runs)[0])
    spread = group.spread("harmful_score")
    assert spread is not None
    return spread.high - spread.low


@pytest.mark.parametrize("stored", [True, False])
def test_seeds_do_not_replace_prompts(tmp_path: Path, stored: bool) -> None:
    for name, counts in {"one": [5], "agreeing": [5, 5, 5], "differing": [5, 5, 6]}.items():
        for seed, count in enumerate(counts):
            run = save_run(tmp_path / name, first(count), seed=seed)
            if not stored:
                (run / "judged.jsonl").unlink()
    one, agreeing, differing = (width(tmp_path / name) for name in ("one", "agreeing", "differing"))
    assert one - 1e-6 <= agreeing < differing


def test_an_interval_over_seeds_is_of_their_verdicts(tmp_path: Path) -> None:
    hits = [first(20), first(30)]
    runs = [save_run(tmp_path, row, seed=seed) for seed, row in enumerate(hits)]
    rate = seed_and_prompt_interval(hits, PROMPTS)
    assert width(tmp_path) == pytest.approx(rate.high - rate.low)
    # Verdicts of another judging do not count.
    (runs[0] / "judged.jsonl").write_text((runs[1] / "judged.jsonl").read_text())
    (group,) = seed_groups(read_runs([tmp_path]), ["method"])
    assert [run.verdicts("harmful_score") is None for run in group.runs] == [True, False]


def test_two_runs_are_compared_in_the_order_of_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = save_run(tmp_path, first(30), method="sft"), save_run(tmp_path, first(18))
    (forward,), (backward,) = comparisons(before, after), comparisons(after, before)
    assert (forward.setting, forward.baseline, forward.runs) == ("lisa", "sft", 1)
    assert (backward.setting, backward.baseline) == ("sft", "lisa")
    score, opposite = forward.scores["harmful_score"], backward.scores["harmful_score"]
    assert score.difference.value == pytest.approx(-8.0)
    assert opposite.difference.value == pytest.approx(8.0)
    assert score.p == opposite.p == pytest.approx(binomtest(0, 12).pvalue)
    assert comparisons(tmp_path) == [forward]
    assert write_sweep([before, after], tmp_path / "compared") == 0
    page = (tmp_path / "compared" / "report.html").read_text()
    assert f"<td>{score}</td>" in page
    assert "p = 0.00049" in capsys.readouterr().out


def test_methods_are_paired_with_sft_and_with_their_ablations_by_seed(tmp_path: Path) -> None:
    counts = {"sft": (60, 70), "bso": (40, 30), "proximal": (9, 10), "lisa": (10, 12)}
    for method, pair in counts.items():
        for seed, count in enumerate(pair):
            save_run(tmp_path, first(count), method=method, seed=seed)
    save_run(tmp_path, first(0), method="sft", seed=7)  # a seed without a partner
    differences = {(c.setting, c.baseline): c.scores for c in comparisons(tmp_path)}
    pairs = [("bso", "sft"), ("lisa", "sft"), ("lisa", "bso"), ("lisa", "proximal"), ("proximal", "sft")]
    assert list(differences) == pairs
    for (setting, baseline), scores in differences.items():
        expected = (sum(counts[setting]) - sum(counts[baseline])) / 3
        assert scores["harmful_score"].difference.value == pytest.approx(expected)
        assert scores["accuracy"].difference.value == pytest.approx(-expected)
        assert {score.p for score in scores.values()} == {None}


def test_runs_on_other_prompts_are_not_paired(tmp_path: Path) -> None:
    save_run(tmp_path, first(30), method="sft")
    other = save_run(tmp_path, first(18), [f"other {prompt}" for prompt in PROMPTS])
    (comparison,) = comparisons(tmp_path)
    assert list(comparison.scores) == ["accuracy"]
    (other / "judged.jsonl").write_text('{"judge": "embedded"}\n')
    statuses = {run.folder.name: (run.status, "judged.jsonl, line 1" in run.cause) for run in read_runs([tmp_path])}
    assert statuses == {"sft-1": ("finished", False), "lisa-1": ("failed", True)}


def test_small_p_values_are_bounded() -> None:
    assert [format_p(p) for p in (1.0, 0.0123, 1e-9)] == ["p = 1", "p = 0.012", "p < 0.0001"]


def test_task_rows_with_equal_texts_are_separate_and_equal_in_all_runs(tmp_path: Path) -> None:
    one, other = (
        read_verdicts(save_run(tmp_path, first(count), seed=count))["", "final", "accuracy"] for count in (3, 70)
    )
    assert len({*one.prompts}) == len(one.prompts) == 150
    assert one.prompts == other.prompts
    assert one.hits == tuple(not hit for hit in first(3))
