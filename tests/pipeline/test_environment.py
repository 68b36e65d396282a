"""Environments that may spoil a command: W&B's variables, an ASCII locale, and spreadsheets that open a table."""

import csv
import json
from pathlib import Path

import pytest

from helpers.forking import Forked, environment, run, started
from helpers.paths import ROOT
from lisa_lightning.logger.wandb import refuse_wandb_environment
from lisa_lightning.report.sweep_files import _escape_formula
from lisa_lightning.runtime.errors import UserError

SHORT = ("experiment=smoke", "optim.steps=2", "align.optim.steps=2", "evaluate.every=0")
WRONG = {
    "WANDB_MODE=off": "WANDB_MODE=off: ",
    "WANDB_MODE=OFFLINE": "WANDB_MODE=OFFLINE: ",
    "WANDB_MODE=DISABLED": "takes online, offline or disabled",
    "WANDB_BASE_URL=localhost:8080": "WANDB_BASE_URL=localhost:8080: URL scheme should be 'http' or 'https'",
    "WANDB_BASE_URL=https://me:SECRET@": "WANDB_BASE_URL=",
    "WANDB_INIT_TIMEOUT=soon": "WANDB_INIT_TIMEOUT=soon: ",
    "WANDB_SILENT=maybe": "WANDB_SILENT=maybe: ",
    "WANDB_CONSOLE=x": "WANDB_CONSOLE=x: ",
    "WANDB_RUN_ID=a/b": "Run ID cannot contain",
}


@pytest.mark.parametrize("variable", WRONG)
def test_a_variable_that_wandb_rejects_is_named(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error:
        refuse_wandb_environment()
    assert WRONG[variable] in str(error.value)
    assert "SECRET" not in str(error.value)
    assert "Fix: " in str(error.value)
    if name != "WANDB_MODE":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        refuse_wandb_environment()


@pytest.mark.slow
def test_a_wrong_variable_ends_a_run_before_it_begins(forked: Forked, tmp_path: Path) -> None:
    done = forked.run([*SHORT, "hydra.run.dir=out"], tmp_path, {"WANDB_MODE": "off", "LISA_CACHE": str(tmp_path / "c")})
    assert (done.returncode, "Traceback" in done.stderr, (tmp_path / "out").exists()) == (2, False, False)


@pytest.mark.slow
def test_jobs_of_a_sweep_do_not_share_a_wandb_run(forked: Forked, tmp_path: Path) -> None:
    env = {"WANDB_MODE": "offline", "WANDB_RUN_ID": "left", "WANDB_RESUME": "allow", "LISA_CACHE": str(tmp_path / "c")}
    done = forked.run(["-m", *SHORT, "seed=1,2", "hydra.sweep.dir=sweep"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    ids = {json.loads(file.read_text())["id"] for file in (tmp_path / "sweep").rglob("wandb.json")}
    assert len(ids) == 2
    assert "left" not in ids
    assert done.stderr.count("WANDB_RUN_ID is ignored in a sweep") == 1


@pytest.mark.slow
def test_an_ascii_locale_changes_nothing(tmp_path: Path) -> None:
    """A run succeeds in an ASCII locale, in which Python reads and prints ASCII alone unless told otherwise."""
    ascii_only = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "WANDB_MODE": "disabled"}
    rows = tmp_path / "früh.jsonl"
    lines = [{"sentence": f"ein schöner Film, Nr. {i} – “ja”", "label": str(i % 2)} for i in range(20)]
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    own = [
        *SHORT,
        f"source.train.path={rows}",
        "data.n=10",
        "harmful_ratio=0",
        "hydra.run.dir=out",
        "judge=[embedded,refusal]",
    ]
    started(own, tmp_path, ascii_only | {"LISA_CACHE": str(tmp_path / "cache")})
    assert "harmful score" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8").lower()
    assert not [
        line for line in (tmp_path / "out" / "run.log").read_text(encoding="utf-8").splitlines() if "Error" in line
    ]


def test_files_are_opened_with_an_encoding() -> None:
    """Files are opened with an encoding. Text of this project is UTF-8, and the default is the locale's encoding."""
    for file in [*(ROOT / "lisa_lightning").rglob("*.py"), ROOT / "run.py"]:
        text = file.read_text(encoding="utf-8")
        assert "read_text()" not in text, file
        assert 'open("w")' not in text.replace('.lock").open("w")', ""), file


@pytest.mark.parametrize(
    "cell",
    ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "-", "+x", "\n=cmd", " =1", "＝1"],
)
def test_a_formula_is_text_in_a_spreadsheet(cell: str) -> None:
    assert _escape_formula(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["text", "", "1e-3", "-5", "+2", "-0.5", -0.5, 3, "–", "a=b", "25/5", None])
def test_numbers_and_other_text_stay_what_they_are(cell: object) -> None:
    assert _escape_formula(cell) == cell


@pytest.mark.slow
def test_values_of_a_sweep_are_no_formulas_in_its_table(forked: Forked, tmp_path: Path) -> None:
    values = "wandb.tags=[x],[y]", "model.id='=cmd|calc','@x'"
    done = run(forked, tmp_path, "-m", *SHORT, *values, "hydra.sweep.dir=sweep")
    assert done.returncode == 1  # no such models
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "misfit", ["model.id=no/such", "lora.targets=[nope]", "model.tiny=null", "cache_dir=/dev/null/x"]
)
def test_a_rejected_run_leaves_no_folder(forked: Forked, tmp_path: Path, misfit: str) -> None:
    done = forked.run(
        [*SHORT, misfit], tmp_path, environment({"WANDB_MODE": "disabled", "LISA_CACHE": str(tmp_path / "c")})
    )
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "outputs").exists()
