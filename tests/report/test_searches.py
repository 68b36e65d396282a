"""Searches on a page: trials, halves of the prompts, the worst case, and unequal budgets."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.judged_runs import PROMPTS, save_run
from lisa_lightning.evaluation.rates import estimate_rate
from lisa_lightning.report.run_verdicts import Verdicts, split_prompts
from lisa_lightning.report.search_section import WORST_CASE, search_section
from lisa_lightning.report.search_trials import Objective, Trial, drop_trials, read_trials, write_trial
from lisa_lightning.report.searches import read_searches
from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.report.sweep_runs import read_runs
from lisa_lightning.runtime.errors import UserError

ATTACKER = Objective("attacker", 0.9, 80.0)


def hits(search: int, report: int) -> list[bool]:
    """Return verdicts with these numbers of flagged answers on even and on odd prompts."""
    return [i // 2 < (report if i % 2 else search) for i in range(len(PROMPTS))]


def save_search(folder: Path, method: str, values: list[float | None], flagged: list[list[bool]]) -> None:
    for number, (value, of_trial) in enumerate(zip(values, flagged, strict=True)):
        if value is not None:
            save_run(folder, of_trial, method=method, seed=number)
        write_trial(folder, Trial(number, f"{method}-{number}", value, 4, ATTACKER))
    save_run(folder / "default", hits(1, 15), method=method)
    for file in (folder / "default" / f"{method}-1").iterdir():
        file.rename(folder / "default" / file.name)


@given(st.lists(st.tuples(st.integers(0, 9).map(str), st.booleans())), st.integers(0, 40))
def test_halves_of_the_prompts_share_none_and_stay_as_prompts_are_added(
    answers: list[tuple[str, bool]], n: int
) -> None:
    halves = split_prompts(Verdicts(tuple(p for p, _ in answers), tuple(h for _, h in answers)))
    first, second = (set(half.prompts) for half in halves)
    assert not first & second
    assert sorted((p, h) for half in halves for p, h in zip(half.prompts, half.hits, strict=True)) == sorted(answers)
    assert len(second) <= len(first) <= len(second) + 1
    start = split_prompts(Verdicts(tuple(p for p, _ in answers[:n]), tuple(h for _, h in answers[:n])))
    assert all(set(part.prompts) <= set(half.prompts) for part, half in zip(start, halves, strict=True))


def test_the_worst_case_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    # The third trial is too inaccurate, and the fourth failed.
    trials = [hits(15, 60), hits(30, 45), hits(70, 75), []]
    save_search(tmp_path, "lisa", [20.0, 40.0, -9.0, None], trials)
    (search,) = read_searches([tmp_path], read_runs([tmp_path]))
    assert [t.counts for t in search.trials] == [True, True, False, False]
    assert search.best_so_far == [(1.0, 20.0), (2.0, 40.0), (3.0, 40.0), (4.0, 40.0)]
    section = search_section([search], tmp_path)
    assert section is not None
    row = dict(zip(WORST_CASE[:5], section.rows[0][:5], strict=True))
    rate = estimate_rate([i < 45 for i in range(75)], [str(i) for i in range(75)])
    assert row["harmful score"] == "60.0"
    assert row["95 % interval"] == f"{rate.low:.1f} to {rate.high:.1f}"
    assert section.rows[0][5] == "20.0"  # at the default setting, on the same half
    assert section.rows[0][1] == "3 of 4"
    assert section.rows[0][8] == "62.5 %"  # of the undefended accuracy: 75 wrong of 150 in this trial
    assert [cells[-1] for *_, cells in section.tables[0].rows] == ["counts", "counts", "too inaccurate", "failed"]


def test_unequal_budgets_are_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_search(tmp_path / "a", "lisa", [20.0, 30.0], [hits(15, 15), hits(20, 20)])
    save_search(tmp_path / "b", "sft", [20.0, 30.0], [hits(15, 15), hits(20, 20)])
    write_sweep([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert "unequal numbers" not in (tmp_path / "both/report.html").read_text()
    save_search(tmp_path / "c", "bso", [20.0, None], [hits(15, 15), []])
    write_sweep([tmp_path / "a", tmp_path / "c"], tmp_path / "both")
    note = "The searches have unequal numbers of finished trials (no_align + lisa 2, no_align + bso 1)"
    page = (tmp_path / "both/report.html").read_text()
    assert note in page
    assert note in capsys.readouterr().out
    assert "Harmful score that the search has reached" in page
    assert (tmp_path / "both/sweep.csv").read_text().count("\n") == 1 + 3 + 2


def test_records_of_trials_are_checked(tmp_path: Path) -> None:
    trials = [Trial(n, f"job{n}", 1.0, 9, ATTACKER) for n in (11, 2, 0)]
    for trial in trials:
        write_trial(tmp_path, trial)
    assert read_trials(tmp_path) == trials[::-1]
    drop_trials(tmp_path, 2)
    assert read_trials(tmp_path) == trials[2:]
    for damage in ('{"number": 0}', "[]", json.dumps({"number": "0"}), "{"):
        (tmp_path / "trials" / "0003.json").write_text(damage)
        with pytest.raises(UserError, match="repeat the command of the search"):
            read_trials(tmp_path)


def test_a_trial_leads_to_no_run_outside(tmp_path: Path) -> None:
    save_run(tmp_path, hits(1, 1))
    (tmp_path / "search").mkdir()
    save_run(tmp_path / "search", hits(1, 1))
    write_trial(tmp_path / "search", Trial(0, "../lisa-1", 1.0, 1, ATTACKER))
    (search,) = read_searches([tmp_path / "search"], read_runs([tmp_path / "search"]))
    assert search.trials[0].run is None
