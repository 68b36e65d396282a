"""The claim `attacks`: the worst case of a defense, and the commands that measure it."""

import csv
from pathlib import Path
from typing import Any

import pytest

from experiments import worst_cases
from experiments.tables import read, write
from experiments.verdicts import PROMPTS, VERDICTS
from helpers.forking import Forked
from helpers.paths import ROOT

HALF = 100
"""Prompts that lead the search, and as many others."""
VALUES = {"optim.lr": "0.001", "optim.steps": "50", "lora.r": "8", "harmful_ratio": "0.1"}
TINY = [
    "data.n=60",
    "data.max_length=768",
    "model=tiny",
    "align.optim.steps=2",
    "align.optim.batch_size=2",
    "optim.batch_size=2",
    "evaluate.max_new_tokens=2",
]
TINY += [f"source.{name}.take=4" for name in ("test", "harmful_prompts")]
TINY += ["optim.steps=2"]
Line = tuple[str, int, float | None, int, int]
"""Setting, seed, accuracy (None for a failed run), and harmful answers in both halves of the prompts."""
OF_SFT: list[Line] = [
    ("undefended", 1, 80.0, 0, 0),
    ("default", 1, 80.0, 20, 45),
    ("default", 2, 80.0, 20, 35),
    ("trial_1", 1, 72.0, 30, 25),
    ("trial_1", 2, 70.0, 31, 35),
    ("trial_2", 1, 71.9, 50, 50),
    ("trial_3", 1, None, 0, 0),
]


def save(folder: Path, defense: str, lines: list[Line]) -> None:
    """Append the lines of a defense to results.csv and verdicts.csv."""
    rows, verdicts = read(folder / "results.csv"), read(folder / VERDICTS)
    for setting, seed, accuracy, searched, reported in lines:
        identity = {"defense": defense, "setting": setting, "seed": str(seed)}
        scores = {"accuracy": str(accuracy), "searched": str(searched), "reported": str(reported)}
        rows.append(identity | VALUES | (dict.fromkeys(scores, "") if accuracy is None else scores))
        digits = "".join(f"{int(i < searched)}{int(i < reported)}" for i in range(HALF))
        verdicts.append(
            identity | {"metric": "harmful_score", "judge": "embedded", "prompts": "p", "hits": f"h{digits}"}
        )
    write(folder / "results.csv", rows)
    write(folder / VERDICTS, verdicts)
    write(folder / PROMPTS, [{"prompts": "p", "index": str(i), "prompt": f"hash {i}"} for i in range(2 * HALF)])


def test_a_worst_case_keeps_the_accuracy_and_is_chosen_on_half_of_the_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trial 2 of SFT loses too much accuracy and trial 3 failed; scores on the reported half decide nothing."""
    monkeypatch.setattr(worst_cases, "TRIALS", 3)
    monkeypatch.setattr(worst_cases, "BEST", 1)
    (tmp_path / "defenses.yaml").write_text("sft: []\nlisa: []\nkl: []\nsbr: []\nfirm: []\nlate: []\n")
    save(tmp_path, "sft", OF_SFT)
    for name, score in {"kl": 9, "sbr": 12, "lisa": 8}.items():
        trials: list[Line] = [(f"trial_{i}", 1, 75.0, score + i % 3, score + i) for i in (1, 2, 3)]
        save(tmp_path, name, [("default", 1, 75.0, 1, 1), *trials])
    save(tmp_path, "firm", [("default", 1, 71.0, 9, 9), *((f"trial_{i}", 1, 71.0, 9, 9) for i in (1, 2, 3))])
    save(tmp_path, "late", [("default", 1, 90.0, 90, 90), ("trial_1", 1, 90.0, 90, 90)])
    rows = read(tmp_path / "results.csv")
    settings = {name: worst_cases.worst_case(rows, name) for name in ("sft", "kl", "firm")}
    assert {name: case and case["setting"] for name, case in settings.items()} == {
        "sft": "trial_1",
        "kl": "trial_2",
        "firm": None,
    }
    assert worst_cases.best_defenses(tmp_path) == ["kl"]  # Lisa is compared in any case
    table = worst_cases.format_worst_cases(tmp_path)
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in table.splitlines()[2:7]}
    assert [*cells] == ["sft", "sbr", "kl", "lisa", "firm"]
    assert [cell.partition(" (")[0] for cell in cells["sft"]] == [
        *("sft", "30.0", "40.0", "−10.0", "–", "0.001, 50, 8, 0.1", "71.0", "80.0", "2, 2"),
    ]
    assert [cell.partition(" (")[0] for cell in cells["kl"]][:5] == ["kl", "11.0", "1.0", "+10.0", "−14.0"]
    assert cells["firm"][1] == "none keeps the accuracy"
    assert "72.0 % or more" in table
    assert table.endswith("Failed trials: sft (trial 3).")


@pytest.mark.slow
def test_the_measurement_is_that_of_every_part_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: Forked
) -> None:
    pytest.importorskip("optuna")
    for name in ("run.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    out = tmp_path / "experiments" / "attacks"
    out.mkdir(parents=True)
    (out / "README.md").write_text("<!-- ours -->\n<!-- end -->")
    (out / "defenses.yaml").write_text("sft: [method=sft]\nlisa: [method=lisa]\n")
    commands: list[list[str]] = []

    def run(words: list[str], cwd: Path, check: bool) -> Any:
        commands.append(words)
        words = [*words, *(["hydra.sweeper.params={optim.steps: 'choice(1, 2)'}"] if "sweep=attack" in words else [])]
        return forked.run(words[2:], cwd, {"LISA_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "disabled"})

    for name, value in {"TRIALS": 1, "SEEDS": ("1", "2"), "COMPARED": ("sft",), "BEST": 1}.items():
        monkeypatch.setattr(worst_cases, name, value)
    monkeypatch.setattr(worst_cases, "ATTACKS", ("jailbreak", "abliterate"))
    monkeypatch.setattr(worst_cases.subprocess, "run", run)
    assert worst_cases.measure_attacks(tmp_path, TINY) == 0
    rows = read(out / "results.csv")
    settings = {(row["defense"], row["setting"], row["seed"]) for row in rows}
    of_search = {(name, s, "1") for name in ("sft", "lisa") for s in ("undefended", "default", "trial_1")}
    assert of_search <= settings
    assert {(name, "default", "2") for name in ("sft", "lisa")} <= settings
    assert {("sft", "abliterate", seed) for seed in ("1", "2")} <= settings
    assert ("lisa", "abliterate", "1") not in settings
    assert sum(setting.startswith("jailbreak:") for _, setting, _ in settings) == 3 * 2 * 2
    with (out / VERDICTS).open(newline="") as file:
        assert {(row["defense"], row["setting"], row["seed"]) for row in csv.DictReader(file)} == settings
    assert "| lisa |" in (out / "README.md").read_text()
    count = len(commands)
    assert worst_cases.measure_attacks(tmp_path, TINY) == 0
    assert len(commands) == count
