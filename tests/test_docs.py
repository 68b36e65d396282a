"""The pages of docs/, followed to the letter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_task_is_added_as_the_page_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "adding_a_task.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL))
    (command,) = re.findall(r"```\npython (run\.py .*?)\n```", page)
    (tmp_path / "letters.py").write_text(blocks["python"])
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "letters.yaml").write_text(blocks["yaml"])
    row = json.loads(blocks["json"])
    for name, count in (("train", 40), ("test", 3)):
        rows = [row | {"word": name[0] * n, "count": n} for n in range(1, count + 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    env = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}",
        "LISA_CACHE": str(tmp_path / "cache"),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [*command.split(), f"hydra.searchpath=[file://{tmp_path}/conf]", "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["final/accuracy_answers"] == 2
    asked = [json.loads(line) for line in (tmp_path / "out" / "responses.jsonl").read_text().splitlines()]
    assert {(a["context"], a["target"]) for a in asked if a["kind"] == "task"} == {("t", "1"), ("tt", "2")}
