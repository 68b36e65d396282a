"""Claims of experiments/: the command of each composes, and numbers are merged run by run and drawn."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from benchmarks.defenses import CURATES, METHODS, REPAIRS
from experiments import __main__ as experiments
from experiments import tuned
from experiments.tables import BASELINES, SCORES, UNTRAINED, list_table, merge, read, spread, write
from experiments.verdicts import read_verdicts, stored_runs, write_verdicts
from helpers.forking import Forked
from helpers.judged_runs import save_run
from helpers.paths import ROOT
from lisa_lightning.config.validate import check
from lisa_lightning.report.comparisons import compare_settings
from lisa_lightning.report.run_verdicts import Verdicts
from lisa_lightning.report.sweep_runs import read_runs, seed_groups
from lisa_lightning.runtime.errors import UserError

PROMPTS = tuple(map(str, range(100)))
COUNTS = (60, 70, 10, 20, 40, 50)
"""Flagged answers of two seeds of SFT, of a defense and of its control."""
TINY = [
    "model=tiny",
    "align.optim.steps=2",
    "align.optim.batch_size=2",
    "optim.batch_size=2",
    "optim.steps=12",
    "source.test.take=4",
    "source.harmful_prompts.take=4",
    "source.harmless_prompts.take=4",
    "evaluate.max_new_tokens=2",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments.CLAIMS)
def test_every_claim_has_a_command_that_composes_and_a_folder_that_says_what_came_of_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PUBLIC_ROWS", "rows")
    folder = ROOT / "experiments" / name
    claim = experiments.CLAIMS[name]
    sweep = [*claim.rows, *claim.sweep, *claim.separate]
    overrides = [s if "[" in s else s.partition(",")[0] for s in sweep if "=" in s]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        where = [f"hydra.searchpath=[file://{folder}]"] if "--config-dir" in sweep else []
        cfg = compose("config", ["experiment=sst2_lisa", *overrides, *where], return_hydra_config=True)
        swept = cfg.hydra.sweeper.get("params") or {}
        chosen = [f"{k}={str(v).split(',')[0] if '[' not in str(v) else '[5,25]'}" for k, v in swept.items()]
        check(compose("config", ["experiment=sst2_lisa", *overrides, *where, *chosen]))
    assert f"({name}/README.md)" in (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    there = {f.name for f in folder.iterdir()}
    assert "README.md" in there
    assert ("results.csv" in there) == ("plot.png" in there)


@pytest.mark.parametrize("name", experiments.CLAIMS)
def test_the_pages_table_is_that_of_the_numbers(name: str) -> None:
    folder = ROOT / "experiments" / name
    table = experiments.format_results(folder, experiments.CLAIMS[name])
    assert f"<!-- ours -->\n\n{table}\n\n<!-- end -->" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_tables_of_results_and_speed_are_those_of_the_numbers() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = read(ROOT / "experiments" / "harmful_ratio" / "results.csv")
    names = {"SFT": "sft", "BSO": "bso", "VLGuard": "vlguard", "proximal only": "proximal", "Lisa": "lisa"}
    cells = {name: ("0.1", method) for name, method in names.items()} | {"SFT, harmful ratio 0": ("0", "sft")}
    for name, (ratio, method) in cells.items():
        own = [row for row in rows if (row["harmful_ratio"], row["method"]) == (ratio, method)]
        assert f"| {name} | {' | '.join(spread(own, score) for score in SCORES)} |" in page
    _, _, table = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8").partition("| what | AMD EPYC |")
    said = {line.split("|")[1].strip(): line for line in table.partition("\n\n")[0].splitlines()[2:]}
    assert len(said) > 10
    for cpu, column in (("amd-epyc", 1), ("intel-xeon-processor", 2)):
        measured = json.loads((ROOT / "benchmarks" / "results" / f"{cpu}.json").read_text())["results"]
        assert said.keys() <= {found["what"] for found in measured}
        for found in measured:
            if found["what"] in said:
                assert said[found["what"]].split("|")[column + 1].split()[0] == f"{found['measured']:.3g}", (cpu, found)


def test_the_benchmark_names_the_passes_of_every_defense() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc.json").read_text())["results"]
    notes = {row["what"]: row["note"] for row in rows if row["what"].endswith("of SFT's")}
    passes = {f"{name}: a step, of SFT's": cost for name, (cost, _) in METHODS.items()}
    passes |= {f"{name}: a step, of SFT's": cost for name, (cost, _) in CURATES.items()}
    measured = {
        what: note.partition(f"; {re.findall(r'[0-9.]+ to [0-9.]+ in', note)[0]}")[0] for what, note in notes.items()
    }
    assert measured == {what: cost for what, cost in passes.items() if what in measured}
    assert len(measured) >= 15
    assert {f"{name}: the repair, of SFT's step" for name in REPAIRS} <= {row["what"] for row in rows}


@pytest.mark.slow
def test_every_arm_is_what_it_says_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    files = tmp_path / "experiment" / "defenses"
    files.mkdir(parents=True)
    defenses: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "experiments" / "defenses" / "defenses.yaml"))
    tried = {name: tuned.arms(name, own) for name, own in defenses.items() if "like" not in own}
    every = [arm for own in tried.values() for arm in own]
    assert {len(own) for name, own in tried.items() if name != "sft"} == {3}
    every += [tuned.control(name, own, tried[own["like"]][1]) for name, own in defenses.items() if "like" in own]
    every.append(tried["booster_vaccine"][2] | tried["ewc"][0])
    assert len({arm.name for arm in every}) == len(every)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for arm in every:
            arm.write(files)
        for arm in every[::3]:  # an arm of each defense, and some controls
            chosen = [f"experiment=defenses/{arm.name}", f"hydra.searchpath=[file://{tmp_path}]"]
            cfg = compose("config", [*chosen, *tuned.VALIDATION], return_hydra_config=True)
            found = {k: v for k, v in cfg.hydra.runtime.choices.items() if k in ("curate", "align", "method", "repair")}
            assert found == {"curate": "none", "align": "sft", "method": "sft", "repair": "none", **arm.choices}
            assert all(OmegaConf.select(cfg, key) == value for key, value in {**arm.fixed, **arm.tuned}.items())
            with open_dict(cfg):
                del cfg["hydra"]
            check(cfg)


def test_the_two_best_choices_of_a_stage_are_combined_and_over_refusal_counts() -> None:
    made = {"weak": ("align", "a", 60), "strong": ("align", "a", 80), "other": ("align", "b", 20)}
    made |= {"tune": ("method", "c", 50), "careful": ("method", "d", 40), "worst": ("method", "e", 10)}
    chosen = {name: tuned.Arm((name,), {}, {stage: choice}, {}) for name, (stage, choice, _) in made.items()}
    trials = [
        {"arm": name, "accuracy": "90", "harmful_score": "5", "over_refusal": str(85 - gain)}
        for name, (_, _, gain) in made.items()
    ]
    assert [tuned.gain(trials, arm) for arm in chosen.values()] == [gain for *_, gain in made.values()]
    found = {arm.defenses for arm in tuned._pairs(chosen, trials)}
    assert found == {(a, m) for a in ("strong", "other") for m in ("tune", "careful")}


@pytest.mark.parametrize("name", [n for n, claim in experiments.CLAIMS.items() if claim.about_scores])
def test_the_numbers_of_a_claim_about_scores_make_three_pictures(name: str) -> None:
    with (ROOT / "experiments" / name / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    plots = experiments._plots(experiments.CLAIMS[name], {"results": rows})
    assert [plot.name.partition("-")[0] for plot in plots] == ["harmful_score", "refusal_rate", "accuracy"]


def test_baselines_have_a_table_of_their_own_and_older_numbers_none(tmp_path: Path) -> None:
    """Runs of two tasks store the baselines, a run of an earlier version does not."""
    claim = experiments.Claim([], ["method", "task"])
    scores = dict.fromkeys(SCORES, "50")
    rows = [{"method": "sft", "task": task, "seed": "1"} | scores for task in ("agnews", "sst2")]
    write(tmp_path / "results.csv", rows)
    (without,) = experiments.format_results(tmp_path, claim).split("\n\nHarmful score")[:1]
    new = [row | {"seed": "2", **dict.fromkeys(BASELINES, "10")} for row in rows]
    new[1]["baseline/bag_of_words"] = "84.1"
    write(tmp_path / "results.csv", [*rows, *new])
    write(tmp_path / UNTRAINED, [{"task": "sst2", "seed": "1"} | dict.fromkeys(SCORES, "30")])
    tables = experiments.format_results(tmp_path, claim)
    assert tables.startswith(without.replace("50.0", "50.0 ± 0.0"))
    assert "baseline" not in without
    assert tables.partition("|---|---|---|---|---|\n")[2].split("\n\n")[0].splitlines() == [
        "| majority class, agnews | – | – | – | 10.0 |",
        "| bag of words, agnews | – | – | – | 10.0 |",
        "| aligned model, agnews | 10.0 | 10.0 | 10.0 | 10.0 |",
        "| majority class, sst2 | – | – | – | 10.0 |",
        "| bag of words, sst2 | – | – | – | 84.1 |",
        "| untrained model, sst2 | 30.0 | 30.0 | 30.0 | 30.0 |",
        "| aligned model, sst2 | 10.0 | 10.0 | 10.0 | 10.0 |",
    ]
    columns = list_table([row | {"baseline/majority_class": "10"} for row in rows], ["method", "task"])
    assert "majority" not in columns


def test_stored_verdicts_give_the_paired_differences_of_the_runs(tmp_path: Path) -> None:
    """Runs are stored in two parts, one seed after the other."""
    claim, out = experiments.Claim([], ["method"], primary=("lisa", "sft")), tmp_path / "claim"
    out.mkdir()
    for method, counts in {"sft": (60, 70), "lisa": (10, 12)}.items():
        for seed, count in enumerate(counts):
            save_run(tmp_path / "runs", [i < count for i in range(150)], method=method, seed=seed)
    runs = read_runs([tmp_path / "runs"])
    for seed in ("0", "1", "1"):
        part = [run for run in runs if run.value("seed") == seed]
        write_verdicts(out, part, [{"method": run.value("method"), "seed": seed} for run in part])
    stored = read_verdicts(out, ["method", "seed"])
    assert stored == {
        (run.value("method"), run.value("seed")): {("", *key[1:]): v for key, v in run.all_verdicts.items()}
        for run in runs
    }
    assert "prompt 7" not in "".join(file.read_text() for file in out.iterdir())
    rows = [
        {"method": run.value("method"), "seed": run.value("seed")}
        | {f"{s}{end}": f"{run.metrics.get(f'final/{s}{end}', 0):.4g}" for s in SCORES for end in ("", "_low", "_high")}
        for run in runs
    ]
    write(out / "results.csv", rows)
    (comparison,) = compare_settings(seed_groups(runs, ["method"]), ["method"])
    cells = ("lisa", "sft", "2", *map(str, comparison.scores.values()))
    assert f"| {' | '.join(f'**{cell}**' for cell in cells)} |" in experiments.format_results(out, claim)


def test_each_arm_is_compared_with_sft_and_a_defense_with_its_control() -> None:
    arms = [tuned.Arm((name,), {}, {}, {}) for name in ("sft", "seal", "seal_random")]
    keys = [(arm.name, seed) for arm in arms for seed in ("1", "2")]
    rows = [
        {"arm": name, "seed": seed, "harmful_score": str(count)}
        for count, (name, seed) in zip(COUNTS, keys, strict=True)
    ]
    verdicts = {
        key: {("", "final", "harmful_score"): Verdicts(PROMPTS, tuple(i < count for i in range(100)))}
        for count, key in zip(COUNTS, keys, strict=True)
    }
    runs = stored_runs(rows, ["arm"], verdicts)
    compared = tuned.compare_arms(arms, runs, {"seal_random": "seal", "nlsr_random": "nlsr"})
    differences = {(c.setting, c.baseline): c.scores["harmful_score"].difference.value for c in compared}
    assert differences == pytest.approx(
        {("seal", "sft"): -50, ("seal_random", "sft"): -20, ("seal", "seal_random"): -30}
    )
    assert tuned.compare_arms(arms, stored_runs(rows, ["arm"], {}), {}) == []


@pytest.mark.slow
def test_the_table_of_defenses_measures_the_best_trial_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked
) -> None:
    for name in ("run.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    out = tmp_path / "experiments" / "defenses"
    out.mkdir(parents=True)
    (out / "README.md").write_text("<!-- ours -->\n<!-- end -->")
    (out / "defenses.yaml").write_text("sft: {}\nlisa: {choose: {method: lisa}, key: method.rho, values: [0.1, 1]}\n")
    commands: list[list[str]] = []

    def run(said: list[str], cwd: Path, check: bool) -> Any:
        commands.append(said)
        return forked.run(said[2:], cwd, {"LISA_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "disabled"})

    monkeypatch.setattr(tuned, "SEEDS", (1,))
    monkeypatch.setattr(tuned.subprocess, "run", run)
    assert tuned.measure(tmp_path, TINY) == 0
    with (out / "trials.csv").open(newline="") as file:
        trials = list(csv.DictReader(file))
    assert [row["arm"] for row in trials] == ["lisa-0.1", "lisa-1", "sft"]
    arms = tuned.arms("lisa", {"choose": {"method": "lisa"}, "key": "method.rho", "values": [0.1, 1]})
    best = max(arms, key=lambda arm: tuned.gain(trials, arm)).name
    with (out / "results.csv").open(newline="") as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"sft", best}
    assert "| lisa | method.rho=" in (out / "README.md").read_text()
    stored = {(row["arm"], row["seed"]) for row in read(out / "verdicts.csv")}
    assert stored == {
        (row["arm"], row["seed"]) for table in ("trials", "results") for row in read(out / f"{table}.csv")
    }
    assert [row["task"] for row in read(out / "untrained.csv")] == ["sst2"]
    assert all(f"\n| {name} |" in (out / "README.md").read_text() for name in ("bag of words", "untrained model"))
    assert len(commands) == 5 + 1
    assert tuned.measure(tmp_path, TINY) == 0
    assert len(commands) == 5 + 2  # the untrained model's command, which finds its run


@pytest.mark.slow
def test_numbers_are_merged_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked) -> None:
    """Numbers of a claim's command, which runs in a fork, are merged with those of earlier seeds."""
    for name in ("run.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "experiments").mkdir()
    env = {"LISA_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "disabled"}
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    monkeypatch.setattr(experiments.subprocess, "run", lambda said, cwd, check: forked.run(said[2:], cwd, env))
    out = tmp_path / "experiments" / "excess_drift"

    def lines(file: str) -> list[dict[str, str]]:
        with (out / file).open(newline="") as handle:
            return list(csv.DictReader(handle))

    few = [*TINY, "evaluate.every=6", "evaluate.gradient_rows=2", "method.alignment_steps=2", "method.user_steps=4"]
    assert experiments.main(["excess_drift", *few, "seed=2", "method=lisa"]) == 0
    first = lines("results.csv")
    assert [(row["method"], row["seed"]) for row in first] == [("lisa", "2")]
    assert experiments.main(["excess_drift", *few, "seed=1,2", "method=lisa"]) == 0
    assert [(row["method"], row["seed"]) for row in lines("results.csv")] == [("lisa", "1"), ("lisa", "2")]
    assert lines("results.csv")[1] == first[0]
    assert {*BASELINES} <= first[0].keys()
    assert [(row["task"], row["seed"]) for row in lines("untrained.csv")] == [("sst2", "42")]
    verdicts = [(row["seed"], row["metric"], len(row["hits"])) for row in lines("verdicts.csv")]
    scores = ("accuracy", "harmful_score", "over_refusal", "refusal_rate")
    assert verdicts == [(seed, score, 1 + 4) for score in scores for seed in ("1", "2")]
    points = [(row["seed"], row["step"], bool(row["switch/drift"])) for row in lines("curves.csv")]
    assert [p for p in points if p[0] == "1"] == [
        ("1", s, s not in ("0", "6", "12")) for s in ("0", "3", "6", "7", "9", "12")
    ]
    assert (out / "plot.png").stat().st_size > 10_000


def test_runs_that_differ_in_what_a_claim_does_not_sweep_are_not_merged(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    row = {"method": "lisa", "seed": "2", "accuracy": "70"}
    before = merge(file, [row], ["method"])
    with pytest.raises(UserError, match="two runs of lisa, 2, which differ in what this claim does not sweep"):
        merge(file, [row, row | {"accuracy": "60"}], ["method"])
    assert read(file) == before
