"""The hub's sets: from folders in the hub's own layout, from a server that answers as the hub does, and from none."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import DictConfig

from helpers.hub_server import REPOSITORIES, Hub
from helpers.paths import ROOT
from helpers.serving import serving
from lisa_lightning.data.hub import read_hub
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.source import load_rows
from lisa_lightning.runtime.errors import UserError


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds every repository in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    for repository, files in REPOSITORIES.items():
        for name, content in files.items():
            file = folder / repository / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content())
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


FIRST = {  # task -> its first training row, and training and test rows
    "sst2": ("film 0", "negative", 67_349, 872),
    "agnews": ("news 0", "World", 120_000, 1000),
    "gsm8k": ("", "So.\nThe final answer is:  1", 7473, 1000),
    "alpaca": ("", "output 0", 52_002, 805),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", FIRST)
def test_the_shipped_config_reads_the_published_sets(config: Callable[..., DictConfig], hub: Path, task: str) -> None:
    cfg = config("source=hub", f"task={task}")
    for name in ("train", "test", "alignment", "harmful", "harmful_prompts"):
        cfg.source[name].hub = str(hub / cfg.source[name].hub)
    rows = load_rows(cfg.source, get_class(cfg.task._target_)(), allow_overlap=True)
    context, response, train, test = FIRST[task]
    assert (rows.train[0].context, rows.train[0].response) == (context, response)
    assert (len(rows.train), len(rows.test)) == (train, test)
    assert [r.response for r in rows.alignment[:2]] == ["answer 0", "answer 2"]  # the safe ones, in file order
    assert [r.response for r in rows.harmful[:2]] == ["answer 1", "answer 3"]
    assert (len(rows.alignment), len(rows.harmful)) == (10_000, 13_593)
    assert rows.harmful_prompts == {"": [f"request {i // 2}" for i in range(1000)]}  # whatever is_safe says


def test_another_number_of_rows_is_refused_unless_it_does_not_matter(hub: Path) -> None:
    where = (str(hub / "stanfordnlp/sst2"), None, "validation", None, None)
    with pytest.raises(
        UserError, match=r"sst2 validation: it has 872 rows where the papers' set has 871\. Fix: .*rows=null"
    ):
        read_hub(*where, 871, Reading({"s": "sentence"}), dict)
    assert len(read_hub(*where, None, Reading({"s": "sentence"}), dict)) == 872


@pytest.mark.parametrize(
    ("config", "split", "columns", "sentence"),
    [
        (None, "30k_train", {"p": "prompt"}, "Unknown split"),
        ("nope", "train", {"p": "prompt"}, "BuilderConfig 'nope' not found"),
        (None, "train", {"p": "prompt"}, r"train, row 1: column 'prompt' is missing; there are: idx, sentence, label"),
    ],
)
def test_what_a_set_has_not_is_said(
    hub: Path, config: str | None, split: str, columns: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        read_hub(str(hub / "stanfordnlp/sst2"), config, split, None, None, None, Reading(columns), dict)


@pytest.fixture
def server(hub: Path) -> Iterator[str]:
    for id in ("stanfordnlp/sst2", "tatsu-lab/alpaca_eval"):
        files = [f for f in (hub / id).rglob("*") if f.is_file()]
        Hub.repositories[id] = {str(f.relative_to(hub / id)): f.read_bytes() for f in files}
    with serving(Hub) as url:
        yield url


READ = """
import sys, time
time.sleep = lambda seconds: None  # the library waits longer and longer between its tries
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.hub import read_hub
from lisa_lightning.runtime.errors import UserError
id, split, files, rows, *fields = sys.argv[1:]
try:
    found = read_hub(id, None, split, None, files or None, int(rows), Reading({f: f for f in fields}), dict)
    print(len(found), found[0])
except UserError as error:
    print(error)
"""
SENTENCES = ("stanfordnlp/sst2", "validation", "", "872", "sentence", "label")
EVALUATION = ("tatsu-lab/alpaca_eval", "train", "alpaca_eval.json", "805", "instruction", "output")


def read_from(endpoint: str, home: Path, asked: Sequence[str] = SENTENCES, **more: str) -> str:
    """Return the output about a set of another process, whose hub is at `endpoint`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    env |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", READ, *asked], env=env | more, capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_a_server_that_answers_as_the_hub_then_its_cache_alone(server: str, tmp_path: Path) -> None:
    wanted = "872 {'sentence': 'film 0 ', 'label': 0}"
    assert read_from(server, tmp_path / "home") == wanted
    assert read_from(server, tmp_path / "home", HF_HUB_OFFLINE="1") == wanted


@pytest.mark.slow
def test_one_file_of_a_repository_whose_script_must_not_run(server: str, tmp_path: Path) -> None:
    assert read_from(server, tmp_path, EVALUATION) == "805 {'instruction': 'ask 0', 'output': 'o 0'}"


@pytest.mark.slow
def test_a_hub_that_is_not_there_names_the_set_and_the_ways_out(tmp_path: Path) -> None:
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        said = read_from("http://127.0.0.1:9", tmp_path / "home", **more)
        assert said.startswith("stanfordnlp/sst2 validation: can't be loaded")
        for way in ("connect to the hub", "HF_TOKEN", "HF_HOME", "a folder in the hub's layout", "source=local"):
            assert way in said
