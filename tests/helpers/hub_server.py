"""Servers that stand in for the hub: `Hub` serves invented rows like the papers' sets, `Upload` takes a model."""

import base64
import gzip
import json
import re
from collections.abc import Callable
from io import BytesIO
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet
from omegaconf import OmegaConf

from helpers.serving import Quiet

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
    """Return rows with BeaverTails' columns: each prompt twice in a row, with a safe and an unsafe answer."""
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
    """Return a README.md that names the files of each split, in the format of the hub."""
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


class Hub(Quiet):
    """Stand-in for the hub, which answers with the commit, the files and the content of repositories."""

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


class Upload(Quiet):
    """Stand-in for the hub, which takes one model repository if the request has the token."""

    token: ClassVar[str] = "hf_SECRET"
    is_private: ClassVar[bool] = True
    """Privacy of the repository, independent of the request."""
    created: ClassVar[dict[str, Any]] = {}
    """Last request to create a repository."""
    files: ClassVar[dict[str, bytes]] = {}
    """Uploaded files."""

    @property
    def address(self) -> str:
        """Address of this server."""
        return f"http://{self.headers['Host']}"

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.json({"error": "Invalid username or password."}, 401)
            return
        id = self.path.removeprefix("/api/models/")
        self.json({"_id": "1", "id": id, "private": self.is_private, "tags": [], "downloads": 0, "likes": 0})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.json({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.created.clear()
            self.created.update(json.loads(content))
            self.json({"url": f"{self.address}/{self.created['organization']}/{self.created['name']}", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.json({"files": [{"path": name} | modes for name in names]})
        else:
            lines = [json.loads(line) for line in content.splitlines()]
            added = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({file["path"]: base64.b64decode(file["content"]) for file in added})
            repository = "/".join(self.path.split("/")[3:5])
            self.json(
                {"commitUrl": f"{self.address}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
            )

    def json(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
