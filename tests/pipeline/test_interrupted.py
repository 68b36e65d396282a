"""Ctrl-C and SIGTERM in any stage: their exit status, one hint on a line of its own, and a run that can go on."""

import re
import signal
from typing import Any

import pytest

from helpers.forking import run_helper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HINT = "repeat the command to continue; for a single run add its hydra.run.dir and resume=true"
BY_SIGINT = ("making the model", "fine-tuning", "evaluating", "judging", "the page", "a sweep")
BY_SIGTERM = ("the dry run", "a point of the curves")
MOMENTS = [*(f"{stage} by SIGINT" for stage in BY_SIGINT), *(f"{stage} by SIGTERM" for stage in BY_SIGTERM)]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the reports of tests/helpers/interrupting.py."""
    return run_helper("interrupting", str(tmp_path_factory.mktemp("work")), timeout=380)


def screen(output: str) -> list[str]:
    """Return the lines that a terminal shows: progress bars move its cursor to rewrite theirs."""
    lines, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|.|\n", output, re.DOTALL):
        if piece == "\x1b[A":
            row = max(0, row - 1)
        elif piece == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + piece + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_says_how_to_go_on(reports: dict[str, Any], moment: str) -> None:
    report, number = reports[moment], signal.Signals[moment.rpartition(" ")[2]]
    assert report["status"] == 128 + number, report["output"][-2000:]
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert [line for line in screen(report["output"]) if HINT in line] == [f"Stopped by {name}; {HINT}"]
    assert report["output"].count(HINT) == 1
    assert "Traceback" not in report["output"]
    assert report["again"] == 0


def test_sentences_stand_on_lines_of_their_own(reports: dict[str, Any]) -> None:
    """The sentence of a failure, and a warning in the middle of training, stand on lines of their own."""
    report = reports["a loss that is no number"]
    assert report["status"] == 2
    lines = screen(report["output"])
    (failure,) = [line for line in lines if "of step" in line and "may help" in line]
    assert re.match(r"The (loss|gradient norm) of step \d+ is (nan|inf); ", failure)
    (warning,) = [line for line in lines if "cuts off wholly" in line]
    assert warning.startswith("[")
