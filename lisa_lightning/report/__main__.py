"""`python -m lisa_lightning.report FOLDER...`: write table and page of one or more sweeps, finished or not."""

import argparse
import sys
from pathlib import Path

from lisa_lightning.config.explain import explain
from lisa_lightning.report.sweep_files import write_sweep


def main() -> int:
    """Return the exit status: 0 on success, 1 if a run failed, 2 if the report can't be written."""
    parser = argparse.ArgumentParser(prog="python -m lisa_lightning.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep's folder, or any above runs")
    parser.add_argument(
        "--out", type=Path, help="output folder (default: FOLDER, or the current folder if several are listed)"
    )
    arguments = parser.parse_args()
    folders: list[Path] = arguments.folders
    try:
        return write_sweep(folders, arguments.out or (folders[0] if len(folders) == 1 else Path()))
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        print(message, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
