"""The notebook of examples/: its outputs in the repository, and its execution on the tiny model."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from helpers.paths import ROOT

NOTEBOOK = ROOT / "examples" / "whole_effect.ipynb"
TINY = [
    *("experiment=smoke", "data.n=20", "optim.steps=3", "align.optim.steps=2", "evaluate.every=0"),
    *("source.test.take=2", "source.harmful_prompts.take=2", "source.harmless_prompts.take=1"),
]
PNG = b"\x89PNG"
SCORE = re.compile(r"(.{23}) (harmful_score|refusal_rate|accuracy) +(\d+\.\d) % \((\d+\.\d) to (\d+\.\d)\)")


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def scores(notebook: NotebookNode) -> dict[tuple[str, str], tuple[float, float, float]]:
    """Return the printed score of each model with its interval, and require that nothing else is printed."""
    streams = [output for output in outputs(notebook) if output.output_type == "stream"]
    assert {stream.name for stream in streams} == {"stdout"}
    lines = [line for stream in streams for line in stream.text.splitlines()]
    parsed = {}
    for line in lines:
        match = SCORE.fullmatch(line)
        assert match is not None, line
        label, score, *numbers = match.groups()
        value, low, high = map(float, numbers)
        assert 0 <= low <= value <= high <= 100
        parsed[label.strip(), score] = value, low, high
    assert len(parsed) == len(lines)
    return parsed


def pictures(notebook: NotebookNode) -> list[bytes]:
    data: list[dict[str, Any]] = [output.get("data", {}) for output in outputs(notebook)]
    return [base64.b64decode(entry["image/png"]) for entry in data if "image/png" in entry]


def test_the_stored_outputs_show_the_effect() -> None:
    notebook = read()
    measured = scores(notebook)
    assert {output.output_type for output in outputs(notebook)} == {"stream", "display_data"}
    (picture,) = pictures(notebook)
    assert picture.startswith(PNG)
    attacked, defended = (measured[f"{name}, 10 % harmful rows", "harmful_score"] for name in ("SFT", "Lisa"))
    assert defended[2] < attacked[1]
    undefended, accurate = (measured[f"{name}, 10 % harmful rows", "accuracy"] for name in ("SFT", "Lisa"))
    assert undefended[1] < accurate[2]
    assert accurate[1] < undefended[2]


def test_the_notebook_is_short_and_has_no_trace_of_the_machine() -> None:
    notebook = read()
    nbformat.validate(notebook)
    lines = [line for cell in code_cells(notebook) for line in cell.source.splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= 25
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not re.search(r"/(home|root|tmp|work|usr|opt)/", NOTEBOOK.read_text(encoding="utf-8"))
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)]+)\)", cell.source):
            assert (NOTEBOOK.parent / target.partition("#")[0]).exists(), target


@pytest.mark.slow
def test_the_notebook_runs_from_an_empty_cache(tmp_path: Path) -> None:
    notebook = read()
    (index,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(f"SETTINGS = {TINY}"))
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    path = tmp_path / NOTEBOOK.name
    nbformat.write(notebook, path)
    execute(path)
    executed = nbformat.read(path, as_version=4)
    assert all(cell.execution_count for cell in code_cells(executed))
    assert scores(executed).keys() == scores(read()).keys()
    (picture,) = pictures(executed)
    assert picture.startswith(PNG)
    assert len([*tmp_path.glob("outputs/*/*/metrics.json")]) == 4


def execute(notebook: Path) -> None:
    """Execute a notebook in place, by the interpreter of this process and without the user's Jupyter settings."""
    folders = {f"JUPYTER_{name}_DIR": str(notebook.parent / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {"IPYTHONDIR": str(notebook.parent / "ipython"), "LISA_CACHE": str(notebook.parent / "cache")}
    env = os.environ | folders | {"JUPYTER_PREFER_ENV_PATH": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    # nbclient leaves sockets open, which would be warnings in this process.
    command = [sys.executable, "-m", "jupyter", "execute", "--inplace", str(notebook)]
    done = subprocess.run(command, cwd=notebook.parent, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
