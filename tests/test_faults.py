"""The list of faults stays about the code that there is."""

from faults import FAULTS, ROOT


def test_every_fault_is_about_a_piece_that_is_there_and_tests_that_exist() -> None:
    for fault in FAULTS:
        text = (ROOT / "lisa_lightning" / fault.file).read_text(encoding="utf-8")
        assert fault.old in text, fault
        assert fault.old != fault.new
        assert all((ROOT / "tests" / name).exists() for name in fault.tests.split()), fault
