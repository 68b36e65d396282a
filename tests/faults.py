"""Faults put into the code by hand, each of which a test must catch: how much the tests are worth.

    python tests/faults.py [WORD ...]

Each fault is one replaced piece of one file, in a copy of the project; the tests beside it must fail there. With words,
only faults of files that have one in their names. Prints what survives and the share that is caught; exit status 1
where something survives. `test_faults.py` holds the list to the code.
"""

import importlib
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from fault import Fault
from fault_list import FAULTS as IN_TRAINING
from fault_list_runs import FAULTS as IN_RUNS

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "lightning", "transformers", "peft", "datasets", "sklearn.linear_model", "hydra")
QUIETLY = ("-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")
COPIED = ("lisa_lightning", "conf", "tests", "experiments", "benchmarks", "docs", "run.py", "pyproject.toml")


def caught(fault: Fault, copy: Path) -> bool:
    """Whether the tests fail in a copy that has the fault; in a fork, which has imported the libraries."""
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


def main(words: list[str]) -> int:
    """Try all faults, print; 1 where one survives."""
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
            own = ROOT / name
            (shutil.copytree if own.is_dir() else shutil.copy)(own, copy / name)
        for i, fault in enumerate(chosen, 1):
            if not caught(fault, copy):
                survivors.append(fault)
                print(f"SURVIVES {fault.file}: {fault.old!r} -> {fault.new!r} ({fault.tests})", flush=True)
            elif sys.stdout.isatty():
                print(f"{i} of {len(chosen)}", end="\r", flush=True)
    share = 100 * (1 - len(survivors) / max(1, len(chosen)))
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults caught ({share:.0f} %)")
    return int(bool(survivors) or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
