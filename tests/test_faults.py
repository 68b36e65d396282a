"""The list of faults stays about the code that there is."""

from pathlib import Path

from fault_list import FAULTS as IN_TRAINING
from fault_list_runs import FAULTS as IN_RUNS

ROOT = Path(__file__).parents[1]


def test_every_fault_is_about_a_piece_that_is_there_and_tests_that_exist() -> None:
    for fault in [*IN_TRAINING, *IN_RUNS]:
        text = (ROOT / "lisa_lightning" / fault.file).read_text(encoding="utf-8")
        assert fault.old in text, fault
        assert fault.old != fault.new
        for test in fault.tests.split():
            file, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), fault
