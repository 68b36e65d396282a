"""A run with named prompt sets: its files, page and sweep table, and the same answers judged again."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.composing import composed
from lisa_lightning.pipeline.run import run
from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.runtime.errors import UserError

Command = Callable[..., dict[str, Any]]
PROMPTS = {"one": ["a", "b", "c"], "two": ["b", "d"], "safe": ["e"]}
SCORES = [
    *(
        f"{model}/{judge}set/{name}/harmful_score"
        for model in ("aligned", "final")
        for judge in ("", "embedded/")
        for name in ("one", "two")
    ),
    *(f"final/{judge}set/{name}/refusal_rate" for judge in ("", "refusal/") for name in ("one", "two")),
    *("final/set/safe/over_refusal", "final/refusal/set/safe/over_refusal"),
]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the smoke experiment on three named sets, and returns its metrics."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name, prompts in PROMPTS.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    named = ["source.harmful_prompts={one: {path: one.jsonl}, two: {path: two.jsonl}}"]
    named += ["source.harmless_prompts.safe.path=safe.jsonl", "evaluate.every=0", "optim.steps=2", "cache_dir=cache"]

    def start(*words: str, out: str = "out", sets: bool = True) -> dict[str, Any]:
        return run(composed(["experiment=smoke", *(named if sets else named[2:]), *words], Path(out)))

    return start


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "memory/"))}


@pytest.mark.slow
def test_every_set_has_scores_in_all_files(command: Command, tmp_path: Path) -> None:
    metrics = command()
    for name in SCORES:
        count = len(PROMPTS[name.split("/")[-2]])
        assert metrics[f"{name}_answers"] == count
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert metrics["final/harmful_score_answers"] == 5
    asked = [json.loads(line) for line in Path("out/responses.jsonl").read_text().splitlines()]
    final = [(a["prompt"], a["prompt_set"]) for a in asked if (a["model"], a["kind"]) == ("final", "harmful")]
    assert final == [("a", "one"), ("b", "two"), ("b", "one"), ("d", "two"), ("c", "one")]
    shared = {a["response"] for a in asked if (a["model"], a["prompt"]) == ("final", "b")}
    assert len(shared) == 1
    page = Path("out/report.html").read_text()
    assert page.count("Percent of answers by prompt set") == 2
    assert page.count('<th scope="row">all sets</th>') == 2
    # The same answers are judged again.
    assert without_times(run(composed(["stages=[judge]", "cache_dir=cache"], tmp_path / "out"))) == without_times(
        metrics
    )
    # A finished run resumes to the same result.
    assert without_times(command("resume=true")) == without_times(metrics)
    write_sweep([tmp_path / "out"], tmp_path / "sweep")
    with Path("sweep/sweep.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["final/set/two/harmful_score"]) == metrics["final/set/two/harmful_score"]


@pytest.mark.slow
def test_answers_of_earlier_versions_are_judged_without_sets(command: Command, tmp_path: Path) -> None:
    metrics = command(sets=False)
    assert not [name for name in metrics if "/set/" in name]
    assert "by prompt set" not in Path("out/report.html").read_text()
    for file in ("responses.jsonl", "judged.jsonl"):
        lines = [json.loads(line) for line in Path("out", file).read_text().splitlines()]
        assert {line.pop("prompt_set") for line in lines} == {""}
        Path("out", file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("out/checksums.json").unlink(missing_ok=True)
    assert without_times(run(composed(["stages=[judge]", "cache_dir=cache"], tmp_path / "out"))) == without_times(
        metrics
    )


def test_a_long_prompt_is_named_by_its_set(command: Command) -> None:
    Path("two.jsonl").write_text(json.dumps({"prompt": "word " * 9000}) + "\n")
    with pytest.raises(
        UserError, match=r"source\.harmful_prompts\.two, prompt 1 of the evaluation: it takes more than"
    ):
        command()
