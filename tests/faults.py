"""Put faults into the code by hand, each of which a test must catch.

    python tests/faults.py [WORD ...]

Each fault replaces one piece of one file in a copy of the project, where its tests must fail. With words, only faults
of files that have one in their names are tried. Prints the survivors and the share that is caught.

Exit status 1: a fault survives, or a list names a piece or a test that does not exist. All lists are checked first.
"""

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from fault_lists.fault import Fault
from fault_lists.runs import FAULTS as IN_RUNS
from fault_lists.training import FAULTS as IN_TRAINING
from helpers.paths import ROOT, TESTS

LIBRARIES = ("torch", "lightning", "transformers", "peft", "datasets", "sklearn.linear_model", "hydra")
QUIETLY = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
COPIED = ("lisa_lightning", "conf", "tests", "experiments", "benchmarks", "docs", "run.py", "pyproject.toml")


def caught(fault: Fault, copy: Path) -> bool:
    """Return whether the tests fail in a copy with the fault, in a fork that has imported the libraries."""
    file = copy / "lisa_lightning" / fault.file
    good = file.read_text(encoding="utf-8")
    file.write_text(good.replace(fault.old, fault.new, 1), encoding="utf-8")
    try:
        child = os.fork()
        if child == 0:
            status = 99
            try:
                os.chdir(copy)
                sys.path[:0] = [str(copy), str(copy / "tests")]
                for stream in (1, 2):
                    os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
                status = pytest.main([*QUIETLY, *(f"tests/{t}" for t in fault.tests.split())])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status not in (0, 1):
            raise RuntimeError(f"{fault.file}: pytest ended with {status}:\n{(copy / 'log.txt').read_text()[-2000:]}")
        return status == 1
    finally:
        file.write_text(good, encoding="utf-8")


def stale(fault: Fault) -> str:
    """Return which piece or test of a fault does not exist, or ""."""
    source = ROOT / "lisa_lightning" / fault.file
    if not source.exists() or fault.old not in source.read_text(encoding="utf-8"):
        return f"{fault.file} has no {fault.old!r}"
    for test in fault.tests.split():
        file, _, name = test.partition("::")
        if not (TESTS / file).exists() or f"def {name}" not in (TESTS / file).read_text(encoding="utf-8"):
            return f"{fault.file}: no test {test}"
    return ""


def main(words: list[str]) -> int:
    """Try the faults, print the survivors, and return 1 if there is one."""
    problems = [problem for fault in [*IN_TRAINING, *IN_RUNS] if (problem := stale(fault))]
    print(*problems, sep="\n", end="\n" if problems else "")
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.path = [folder for folder in sys.path if Path(folder).resolve() not in (ROOT, ROOT / "tests")]
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    chosen = [fault for fault in [*IN_TRAINING, *IN_RUNS] if not words or any(word in fault.file for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for i, fault in enumerate(chosen, 1):
            if not caught(fault, copy):
                survivors.append(fault)
                print(f"SURVIVES {fault.file}: {fault.old!r} -> {fault.new!r} ({fault.tests})", flush=True)
            elif sys.stdout.isatty():
                print(f"{i} of {len(chosen)}", end="\r", flush=True)
    share = 100 * (1 - len(survivors) / max(1, len(chosen)))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught ({share:.0f} %)")
    return int(bool(survivors or problems) or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
