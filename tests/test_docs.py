"""The pages of docs/, followed to the letter."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from helpers.forking import Forked
from helpers.paths import ROOT


def blocks(page: str) -> tuple[dict[str, str], list[str]]:
    """Return a page's blocks of code by language, and the arguments of its one command."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (command,) = re.findall(r"```\npython (run\.py .*?)\n```", text)
    return dict(re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)), command.split()


def put(group: str, name: str, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Write the Python and YAML of a group's page to the places that it names, and return its `blocks`."""
    code, arguments = blocks(f"add_an_{group}.md" if group[0] in "aeiou" else f"add_a_{group}.md")
    (folder / f"{name}.py").write_text(code["python"])
    (folder / "own" / group).mkdir(parents=True)
    (folder / "own" / group / f"{name}.yaml").write_text(code["yaml"])
    return code, arguments


def run(forked: Forked, arguments: list[str], folder: Path) -> dict[str, Any]:
    """Return the metrics of a command whose Python and configs lie in `folder`."""
    env = {"PYTHONPATH": str(folder), "LISA_CACHE": str(folder / "cache"), "WANDB_MODE": "disabled"}
    done = forked.run([*arguments[1:], "hydra.run.dir=out"], folder, env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "out" / "metrics.json").read_text())


@pytest.mark.slow
def test_a_task_is_added_as_the_page_says(forked: Forked, tmp_path: Path) -> None:
    code, arguments = put("task", "letters", tmp_path)
    row = json.loads(code["json"])
    for name, count in (("train", 40), ("test", 3)):
        rows = [row | {"word": name[0] * n, "count": n} for n in range(1, count + 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert run(forked, arguments, tmp_path)["final/accuracy_answers"] == 2
    asked = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert {(a["context"], a["target"]) for a in asked if a["kind"] == "task"} == {("t", "1"), ("tt", "2")}


@pytest.mark.slow
def test_a_method_is_added_as_the_page_says(forked: Forked, tmp_path: Path) -> None:
    code, arguments = put("method", "projected", tmp_path)
    assert code["python"].count("\n") < 40
    assert run(forked, arguments, tmp_path)["train/steps"] == 36
    with (tmp_path / "out" / "curves.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "finetune"]
    assert len(rows) == 36
    assert all(float(row["alignment/loss"]) > 0 for row in rows)
    assert {row["projected/conflict"] for row in rows} <= {"0.0", "1.0"}
    (tmp_path / "out").rename(tmp_path / "before")
    (tmp_path / "projected.py").write_text(code["python"].replace("if inner < 0:", "if True:"))
    run(forked, arguments, tmp_path)  # an edited method is trained anew, not found in the cache
    adapters = [(tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in ("before", "out")]
    assert adapters[0] != adapters[1]


@pytest.mark.slow
def test_a_judge_is_added_as_the_page_says(forked: Forked, tmp_path: Path) -> None:
    _, arguments = put("judge", "promises", tmp_path)
    answers = [
        {"prompt": "Is it late?", "response": said} for said in ("Certainly.", "I can't say that.", "Surely not.")
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(a) + "\n" for a in answers))
    metrics = run(forked, arguments, tmp_path)
    assert metrics["responses/harmful_score"] == pytest.approx(200 / 3)
    assert metrics["judges"] == ["promises", "refusal"]


@pytest.mark.slow
def test_an_attack_is_added_as_the_page_says(forked: Forked, tmp_path: Path) -> None:
    code, arguments = put("attack", "repeated", tmp_path)
    assert run(forked, arguments, tmp_path)["train/steps"] == 36
    assert "lisa on sst2 under repeated" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out").rename(tmp_path / "before")
    (tmp_path / "repeated.py").write_text(code["python"].replace("[: self.distinct]", "[-self.distinct :]"))
    run(forked, arguments, tmp_path)
    adapters = [(tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in ("before", "out")]
    assert adapters[0] != adapters[1]


def test_every_attack_stands_in_the_table_of_attacks() -> None:
    page = (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)` .*\| \[\1\.py\]", page, flags=re.MULTILINE))
    assert listed == {f.stem for f in (ROOT / "conf" / "attack").glob("*.yaml")} - {"none"}


def test_every_curve_of_a_method_is_explained() -> None:
    page = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("methods.md", "curves.md"))
    files = [f for group in ("align", "method") for f in (ROOT / "lisa_lightning" / group).glob("*.py")]
    found = {name for f in files for name in re.findall(r'"([a-z_]+/[a-z_]+)(?:\{i\})?":', f.read_text())}
    assert len(found) > 10
    assert [name for name in found if f"`{name}" not in page] == []


def test_every_choice_stands_in_the_table_of_methods() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for group in ("curate", "align", "method", "repair"):
        _, _, section = page.partition(f"## {group}: ")
        rows = re.findall(
            r"^\| `(\w+)` .*\| (?:\[.*?\]\((.*?)\))? ?\|$", section.partition("\n## ")[0], flags=re.MULTILINE
        )
        there = {f.stem for f in (ROOT / "conf" / group).glob("[!_]*.yaml")}
        assert {name for name, _ in rows} == there
        for name, link in rows:
            assert name == "none" or (ROOT / "docs" / link).resolve().exists(), link


def test_names_of_the_glossary_are_in_its_files() -> None:
    absent = []
    for line in (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and (names := re.findall(r"`([^`]+)`", line.split("|")[4])):
            files = [_glossary_file(path) for path in line.split("|")[5].strip().split(", ")]
            text = "\n".join(file.read_text(encoding="utf-8") for file in files)
            # Classes and sections qualify a name, but not that of a file.
            plain = {name: name if name.endswith((".csv", ".json")) else name.rpartition(".")[2] for name in names}
            absent += [n for n, word in plain.items() if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    assert absent == []


def _glossary_file(path: str) -> Path:
    return ROOT / (path if path.startswith("conf/") else f"lisa_lightning/{path}")


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not heading or heading in _headings(target))):
            dead.append(link)
    assert dead == []


def _headings(page: Path) -> set[str]:
    """Return the headings of a page as the fragments of links."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
