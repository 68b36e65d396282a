"""The hub's sets: from folders in the hub's own layout, from a server that answers as the hub does, and from none."""

import gzip
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet
import pytest
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.data.files import Reading
from lisa_lightning.data.hub import read_hub
from lisa_lightning.data.source import load_rows
from lisa_lightning.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def parquet(rows: dict[str, list[Any]]) -> bytes:
    out = BytesIO()
    pyarrow.parquet.write_table(pa.table(rows), out)
    return out.getvalue()


def sst2(count: int) -> bytes:
    return parquet(
        {
            "idx": list(range(count)),
            "sentence": [f"film {i} " for i in range(count)],
            "label": [i % 2 for i in range(count)],
        }
    )


def agnews(count: int) -> bytes:
    return parquet({"text": [f"news {i}" for i in range(count)], "label": [i % 4 for i in range(count)]})


def gsm8k(count: int) -> bytes:
    return parquet(
        {"question": [f"{i} and 1?" for i in range(count)], "answer": [f"So.\n#### {i + 1:,}" for i in range(count)]}
    )


def alpaca(count: int) -> bytes:
    names = ("instruction", "input", "output", "text")
    return parquet({name: [f"{name} {i}" if i % 3 or name != "input" else "" for i in range(count)] for name in names})


def beavertails(count: int) -> bytes:
    """Each prompt twice in a row, a safe and an unsafe answer, with BeaverTails' columns."""
    lines = [
        {
            "prompt": f"request {i // 2}",
            "response": f"answer {i}",
            "category": {"animal_abuse": i % 2 == 1, "violence": False},
            "is_safe": i % 2 == 0,
        }
        for i in range(count)
    ]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def card(*configs: tuple[str, dict[str, str]]) -> bytes:
    """A README.md that says, as those of the hub do, which files are which split."""
    named = [
        {"config_name": name, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
        for name, splits in configs
    ]
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create({'configs': named}))}---\n".encode()


SPLITS = {s: f"data/{s}-00000-of-00001.parquet" for s in ("train", "validation", "test")}
ROUNDS = {"30k_train": "round0/30k/train.jsonl.gz", "30k_test": "round0/30k/test.jsonl.gz"}
MAIN = {s: f"main/{s}-00000-of-00001.parquet" for s in ("train", "test")}
# id -> the files of its repository, with as many rows as the published set has
REPOSITORIES: dict[str, dict[str, Callable[[], bytes]]] = {
    "stanfordnlp/sst2": {
        "README.md": lambda: card(("default", SPLITS)),
        SPLITS["train"]: lambda: sst2(67_349),
        SPLITS["validation"]: lambda: sst2(872),
        SPLITS["test"]: lambda: sst2(1821),
    },
    "fancyzhx/ag_news": {
        "README.md": lambda: card(("default", {s: SPLITS[s] for s in ("train", "test")})),
        SPLITS["train"]: lambda: agnews(120_000),
        SPLITS["test"]: lambda: agnews(7600),
    },
    "openai/gsm8k": {
        "README.md": lambda: card(("main", MAIN), ("socratic", {"train": "socratic/train-00000-of-00001.parquet"})),
        MAIN["train"]: lambda: gsm8k(7473),
        MAIN["test"]: lambda: gsm8k(1319),
        "socratic/train-00000-of-00001.parquet": lambda: gsm8k(1),
    },
    "tatsu-lab/alpaca": {
        "README.md": lambda: card(("default", {"train": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"})),
        "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": lambda: alpaca(52_002),
    },
    "tatsu-lab/alpaca_eval": {
        "alpaca_eval.py": lambda: b"raise SystemExit('a script of the hub ran')\n",
        "alpaca_eval.json": lambda: json.dumps(
            [{"dataset": "d", "instruction": f"ask {i}", "output": f"o {i}", "generator": "g"} for i in range(805)]
        ).encode(),
    },
    "PKU-Alignment/BeaverTails": {
        "README.md": lambda: card(("default", ROUNDS)),
        ROUNDS["30k_train"]: lambda: beavertails(27_186),
        ROUNDS["30k_test"]: lambda: beavertails(3021),
    },
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds every repository in the hub's layout."""
    folder = tmp_path_factory.mktemp("hub")
    for repository, files in REPOSITORIES.items():
        for name, content in files.items():
            file = folder / repository / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content())
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


FIRST = {  # task -> its first training row, and training and test rows
    "sst2": ("film 0", "negative", 67_349, 872),
    "agnews": ("news 0", "World", 120_000, 1000),
    "gsm8k": ("", "So.\nThe final answer is:  1", 7473, 1000),
    "alpaca": ("", "output 0", 52_002, 805),
}


@pytest.mark.parametrize("task", FIRST)
def test_the_shipped_config_reads_the_published_sets(config: Callable[..., DictConfig], hub: Path, task: str) -> None:
    cfg = config("source=hub", f"task={task}")
    for name in ("train", "test", "alignment", "harmful", "harmful_prompts"):
        cfg.source[name].hub = str(hub / cfg.source[name].hub)
    rows = load_rows(cfg.source, get_class(cfg.task._target_)(), allow_overlap=True)
    context, response, train, test = FIRST[task]
    assert (rows.task[0].context, rows.task[0].response) == (context, response)
    assert (len(rows.task), len(rows.test)) == (train, test)
    assert [r.response for r in rows.alignment[:2]] == ["answer 0", "answer 2"]  # the safe ones, in file order
    assert [r.response for r in rows.harmful[:2]] == ["answer 1", "answer 3"]
    assert (len(rows.alignment), len(rows.harmful)) == (10_000, 13_593)
    assert rows.harmful_prompts == [f"request {i // 2}" for i in range(1000)]  # whatever is_safe says


def test_another_number_of_rows_is_refused_unless_it_does_not_matter(hub: Path) -> None:
    where = (str(hub / "stanfordnlp/sst2"), None, "validation", None, None)
    with pytest.raises(UserError, match="sst2 validation: it has 872 rows where the papers' set has 871; rows=null"):
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


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers about repositories as the hub does: their commit, their files, their content."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def answer(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        wanted = self.rfile.read(length).decode() if length else ""
        path = self.path.partition("?")[0]
        asked = re.fullmatch(
            r"(/api)?/datasets/([^/]+/[^/]+)(?:/(resolve|revision|tree|paths-info)/([^/]+)(/.*)?)?", path
        )
        id, about = (asked[2], asked[3]) if asked else ("", None)
        self.files = self.repositories.get(id, {})
        inside = (asked[5] or "/")[1:] if asked else ""
        if asked is None or not self.files or (asked[4] or COMMIT) not in (COMMIT, "main"):
            self.missing()
        elif about == "resolve" and inside in self.files:
            self.reply(self.files[inside], {"ETag": f'"{abs(hash(inside))}"', "X-Repo-Commit": COMMIT})
        elif about in (None, "revision"):
            siblings = [{"rfilename": f} for f in self.files]
            found = {"_id": "1", "id": id, "sha": COMMIT, "private": False, "gated": False, "tags": []}
            self.json(found | {"disabled": False, "downloads": 0, "likes": 0, "siblings": siblings})
        elif about == "tree":
            self.json([self.entry(f) for f in self.files if f.startswith(inside)])
        elif about == "paths-info":
            self.json([self.entry(f) for f in self.files if f in wanted.replace("%2F", "/")])
        else:
            self.missing()

    do_GET = do_HEAD = do_POST = answer

    def missing(self) -> None:
        self.reply(b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, 404)

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": COMMIT}

    def json(self, value: Any) -> None:
        self.reply(json.dumps(value).encode(), {"Content-Type": "application/json"})

    def reply(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        whole, first = len(content), 0
        if self.headers.get("Range", "").startswith("bytes="):
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, last = int(start or 0), int(end or whole - 1)
            content, status = content[first : last + 1], 206
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{whole}"}
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(hub: Path) -> Iterator[str]:
    for id in ("stanfordnlp/sst2", "tatsu-lab/alpaca_eval"):
        files = [f for f in (hub / id).rglob("*") if f.is_file()]
        Hub.repositories[id] = {str(f.relative_to(hub / id)): f.read_bytes() for f in files}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


READ = """
import sys, time
time.sleep = lambda seconds: None  # the library waits longer and longer between its tries
from lisa_lightning.data.files import Reading
from lisa_lightning.data.hub import read_hub
from lisa_lightning.errors import UserError
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
    """What another process, whose hub is at `endpoint`, says of a set."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    env |= {"PYTHONPATH": str(Path(__file__).parents[1])}
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
        assert said.startswith("The data set stanfordnlp/sst2 validation is not to be had")
        for way in ("connect to the hub", "HF_TOKEN", "HF_HOME", "a folder in the hub's layout", "source=local"):
            assert way in said
