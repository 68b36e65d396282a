"""The wheel in a virtual environment without this clone: its command with the package's configs, and with a user's."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

from helpers.forking import environment
from helpers.paths import ROOT
from lisa_lightning import __version__

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="hatchling builds the wheel"),
]
SMALL = ["stages=[align,finetune]", "evaluate.every=0", "optim.steps=4", "align.optim.steps=2"]
CALLBACK = """
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class RankFiles(Callback):
    def __init__(self, folder):
        Path(folder).mkdir(exist_ok=True)
        self.folder = Path(folder)

    def on_train_end(self, trainer, pl_module):
        (self.folder / f"{trainer.global_rank} of {trainer.world_size}").touch()
"""
CALLBACK_CONFIG = "rank_files:\n  _target_: rank_files.RankFiles\n  folder: ranks\n"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the wheel and the source archive."""
    folder = tmp_path_factory.mktemp("archives")
    _execute([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)], ROOT)
    return folder


@pytest.fixture(scope="module")
def scripts(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of executables of a virtual environment with the wheel.

    The dependencies are found in the environment of this process. They come after the wheel, and path files in them are
    not read, so that an editable installation has no effect.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (wheel,) = archives.glob("*.whl")
    python = folder / "bin" / "python"
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    _execute([sys.executable, "-m", "pip", "--python", str(python), *install], folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # pip must not see them: it would find the package installed already.
    (site_packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in dependencies))
    show = (
        "import sys, lisa_lightning.pipeline.command as c; print(c.__file__, c.CONF, 'torch' in sys.modules, sep='\\n')"
    )
    module, conf, imports_torch = _execute([str(python), "-c", show], folder).splitlines()
    assert Path(module).is_relative_to(site_packages)
    assert Path(conf) == site_packages / "lisa_lightning" / "conf"
    assert imports_torch == "False"
    return folder / "bin"


def test_archives_hold_what_they_should(archives: Path) -> None:
    (wheel,), (sdist,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    with ZipFile(wheel) as archive:
        wheel_files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert wheel_files == {*_files("lisa_lightning"), *(f"lisa_lightning/{name}" for name in _files("conf"))}
    assert {PurePosixPath(name).suffix for name in wheel_files} >= {
        *(".css", ".j2", ".jsonl", ".md", ".safetensors", ".typed", ".yaml")
    }
    with tarfile.open(sdist) as archive:
        sdist_files = {member.name.partition("/")[2] for member in archive.getmembers()}
    folders = ("lisa_lightning", "conf", "tests", "experiments", "benchmarks", "docs", "examples")
    assert {name for folder in folders for name in _files(folder)} <= sdist_files
    top = {name for name in sdist_files if "/" not in name}
    assert top >= {"run.py", "pyproject.toml", "Makefile", "requirements.lock", "README.md", "CHANGELOG.md", "LICENSE"}
    assert {name.partition("/")[0] for name in sdist_files} <= {*folders, *top, ".ci"}


def test_the_command_explains_itself_in_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    command = str(scripts / "lisa-lightning")
    assert _execute([command, "--version"], tmp_path) == f"lisa-lightning {__version__}\n"
    assert "  lisa-lightning experiment=sst2_lisa " in _execute([command, "--help"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_smoke_with_a_users_experiment_method_and_callback_runs_on_two_ranks(scripts: Path, tmp_path: Path) -> None:
    method = _blocks("docs/add_a_method.md")
    files = {
        "projected.py": method["python"],
        "own/method/projected.yaml": method["yaml"],
        "own/experiment/mine.yaml": _blocks("docs/running.md")["yaml"],
        "rank_files.py": CALLBACK,
        "own/callbacks/rank_files.yaml": CALLBACK_CONFIG,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = [str(scripts / "lisa-lightning"), "--config-dir", "own", "experiment=mine", *SMALL, "hydra.run.dir=out"]
    more = ["callbacks=rank_files", "trainer=ddp", "trainer.accelerator=cpu"]
    _execute([*command, *more], tmp_path, PYTHONPATH=str(tmp_path))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["train/steps"] == 4
    assert (tmp_path / "out" / "report.html").exists()
    with (tmp_path / "out" / "curves.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "finetune"]
    assert len(rows) == 4
    assert {row["projected/conflict"] for row in rows} <= {"0.0", "1.0"}
    assert {file.name for file in (tmp_path / "ranks").iterdir()} == {"0 of 2", "1 of 2"}


def _blocks(page: str) -> dict[str, str]:
    """Return the blocks of code of a page by language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL))


def _files(folder: str) -> set[str]:
    """Return the paths of a folder's files below the project's root, without caches and outputs."""
    files = [file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()]
    omitted = {"__pycache__", "outputs", "multirun", "wandb"}
    return {f.as_posix() for f in files if not omitted & {*f.parts} and not any(p.startswith(".") for p in f.parts)}


def _execute(command: Sequence[str], folder: Path, **variables: str) -> str:
    """Return the standard output of a successful command, which finds neither the clone nor a cache."""
    settings = {"PYTHONPATH": "", "WANDB_MODE": "disabled", "LISA_CACHE": os.fspath(folder / "cache")}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(settings | variables),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
