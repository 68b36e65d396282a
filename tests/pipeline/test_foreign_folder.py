"""A run's folder from another person or a damaged disk: its files are data, and a wrong one ends in one sentence."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.damage import DAMAGES
from helpers.forking import Forked, run
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.report.sweep_runs import read_runs
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.run_files import SEALED, read_choices, read_config, read_metrics, refuse_changed

JUDGE = ("stages=[judge]", "judge=refusal")
SHORT = ("experiment=smoke", "optim.steps=4", "align.optim.steps=2", "evaluate.every=0", "evaluate.kl_rows=4")


@pytest.fixture(scope="module")
def finished(forked: Forked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run."""
    work = tmp_path_factory.mktemp("finished")
    assert run(forked, work, *SHORT, "hydra.run.dir=run").returncode == 0
    return work / "run"


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run, whose config can be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "checksums.json").unlink()  # whoever writes a config can write that


@pytest.mark.slow
def test_a_class_that_a_foreign_config_names_is_not_run(forked: Forked, folder: Path) -> None:
    (folder / "evil.py").write_text(
        f"import pathlib; pathlib.Path({str(folder / 'PWNED')!r}).touch()\nclass Evil: pass\n"
    )
    for target in (
        "evil.Evil",
        "os.system",
        "lisa_lightning.taskevil.Evil",
        "lisa_lightning.method.lisa.Lisa",
        5,
        None,
    ):
        shutil.copy(folder / "config.yaml", folder / "before")
        (folder / "checksums.json").touch()
        change_config(folder, lambda config, target=target: config["task"].update(_target_=target))
        done = forked.run([*JUDGE, f"hydra.run.dir={folder}"], folder, {"PYTHONPATH": str(folder)})
        assert done.returncode == 2, done.stderr
        assert "names the task class" in done.stderr
        assert "Traceback" not in done.stderr
        shutil.copy(folder / "before", folder / "config.yaml")
    assert not (folder / "PWNED").exists()


@pytest.mark.slow
def test_a_foreign_config_is_not_resolved(forked: Forked, folder: Path) -> None:
    def name_secrets(config: dict[str, Any]) -> None:
        config["harmful_ratio"] = "${oc.env:OPENAI_API_KEY}"
        config["wandb"]["project"] = "${oc.env:HF_TOKEN}"
        config["model"]["id"] = "${oc.decode:${oc.env:HF_TOKEN}}"
        config["stages"] = "${oc.env:HF_TOKEN}"

    change_config(folder, name_secrets)
    secrets = {"OPENAI_API_KEY": "sk-SECRET-one", "HF_TOKEN": "hf_SECRET_two"}
    done = run_with(forked, folder, secrets)
    assert done.returncode == 0, done.stderr
    assert "${oc.env:OPENAI_API_KEY}" in (folder / "report.html").read_text()
    written = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert not [text for text in [*written, done.stdout.encode(), done.stderr.encode()] if b"SECRET" in text]


def run_with(forked: Forked, folder: Path, env: dict[str, str]) -> Any:
    return forked.run([*JUDGE, f"hydra.run.dir={folder}"], folder.parent, env | {"LISA_CACHE": str(folder / "cache")})


ODD_CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no model": lambda config: config.pop("model"),
    "no stages": lambda config: config.pop("stages"),
    "numbers for sections": lambda config: config.update(model=5, method=[1], align="x", data=None),
    "control characters": lambda config: config["model"].update(id="\x1b]0;x\x07<script>"),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", ODD_CONFIGS)
def test_any_config_is_shown(forked: Forked, folder: Path, change: str) -> None:
    change_config(folder, ODD_CONFIGS[change])
    done = run_with(forked, folder, {})
    assert done.returncode == 0, done.stderr
    assert "<script>" not in (folder / "report.html").read_text().partition("<h2")[0]


@pytest.mark.slow
def test_links_of_a_foreign_folder_lead_nowhere(forked: Forked, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for name in ("metrics.json", "judged.jsonl", "report.html", "checksums.json"):
        (folder / f"{name}.part").symlink_to(tmp_path / "mine")
    (folder / "report.html").unlink()
    (folder / "report.html").symlink_to(tmp_path / "mine")
    assert run_with(forked, folder, {}).returncode == 0
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_a_finished_run_is_noticed(folder: Path, name: str, damage: str) -> None:
    DAMAGES[damage](folder / name)
    with pytest.raises(UserError, match=rf"{name} (has changed|is missing) since the run ended\. Fix: restore"):
        refuse_changed(folder)
    if (folder / "config.yaml").exists():  # by which reports find runs
        (run,) = read_runs([folder])
        expected = "unfinished" if (name, damage) == ("metrics.json", "deleted") else "failed"
        assert (run.status, "Fix: " in run.cause) == (expected, expected == "failed")


@pytest.mark.slow
@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("damage", ["halved", "a list"])
def test_without_a_seal_a_broken_file_is_one_sentence(forked: Forked, folder: Path, name: str, damage: str) -> None:
    """A broken file in a folder without a seal ends in one sentence, unless a killed run may have left it.

    Folders of earlier versions, or from other people, have no seal.
    """
    (folder / "checksums.json").unlink()
    DAMAGES[damage](folder / name)
    done = run_with(forked, folder, {})
    assert "Traceback" not in done.stderr
    # Half a list of answers, or no verdicts at all, may be what a killed run has left.
    assert done.returncode == 2 or (name, damage) in MAY_BE_WHOLE
    assert done.returncode == 0 or (name in done.stderr and "Fix: " in done.stderr) or "holds no answers" in done.stderr


MAY_BE_WHOLE = {
    ("responses.jsonl", "halved"),
    ("judged.jsonl", "empty"),
    ("config.yaml", "halved"),
    ("curves.csv", "halved"),
}


READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": read_config,
    "metrics.json": read_metrics,
    "choices.json": read_choices,
    "curves.csv": lambda folder: read_rows(folder / "curves.csv"),
}
BROKEN: dict[str, list[bytes]] = {
    "config.yaml": [
        b"",
        b"- 1",
        b"a: [",
        b"\xff",
        b"a: &a [*a]",
        b"a: &x 1\nb: *x",
        b"!!python/object/apply:os.system [x]",
        b"a: " + b"[" * 3000,
    ],
    "metrics.json": [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"a/b": "x"}',
        b'{"a/b": NaN}',
        b'{"a/b": true}',
        b'{"judges": "x"}',
        b"[" * 9000,
        b'{"a": null}',
    ],
    "choices.json": [b"", b"[]", b"{", b"\xff", b'{"method": 1}', b'{"method": null}'],
    "curves.csv": [
        b"",
        b"a,b\n",
        b"stage,step,x\nf,one,1\n",
        b"stage,step,x\nf,1,y\n",
        b"stage,step,x\nf,1\n",
        b"stage,step,x\nf,1,2,3\n",
        b"\xff\n",
        b"stage,step,x,x\nf,1,2,3\n",
    ],
}


@pytest.mark.parametrize(("name", "content"), [(name, content) for name in BROKEN for content in BROKEN[name]])
def test_a_broken_file_is_named_with_the_fix(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        READERS[name](tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert "Fix: " in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="it is no regular file"):
        READERS[name](tmp_path)


def test_a_folder_without_a_seal_passes_and_a_broken_seal_does_not(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    refuse_changed(tmp_path)
    for content in ("[]", "{", json.dumps({"metrics.json": 1})):
        (tmp_path / "checksums.json").write_text(content)
        with pytest.raises(UserError, match="Fix: "):
            refuse_changed(tmp_path)
