"""`python -m lisa_lightning.report FOLDER...`: table and page of sweeps, finished or not, several together."""

import argparse
import sys
from pathlib import Path

from lisa_lightning.config.explain import explain
from lisa_lightning.report.sweep_files import leave


def main() -> int:
    """The exit status: 1 where a run failed, 2 where there is nothing to report."""
    parser = argparse.ArgumentParser(prog="python -m lisa_lightning.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep's folder, or any above runs")
    parser.add_argument("--out", type=Path, help="where to write (default: FOLDER, or here where there are several)")
    asked = parser.parse_args()
    try:
        return leave(asked.folders, asked.out or (asked.folders[0] if len(asked.folders) == 1 else Path()))
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
