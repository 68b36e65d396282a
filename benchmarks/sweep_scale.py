"""Time, size and memory of a sweep with thousands of runs: `python -m benchmarks.sweep_scale RUN COUNT...`.

RUN is the folder of a finished run, which is copied with other seeds and values into a temporary folder. Prints a line
for each COUNT: seconds to read the runs, seconds to read them again and write page and table, sizes, and peak memory.
"""

import json
import resource
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import yaml

from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.report.sweep_runs import read_runs
from lisa_lightning.runtime.run_files import CONFIG, SEALED, seal

SEEDS = 5
"""Runs of a setting."""


def main(run: Path, counts: list[int]) -> None:
    """Measure each count of runs, the smallest first, since the peak memory never falls."""
    read_runs([run])  # imports
    print("| runs | read, s | all, s | page, MiB | table, MiB | peak memory, MiB |\n|---|---|---|---|---|---|")
    for count in sorted(counts):
        with TemporaryDirectory() as folder:
            sweep = copy_runs(run, Path(folder), count)
            started = perf_counter()
            read_runs([sweep])
            read = perf_counter() - started
            with redirect_stdout(StringIO()):
                write_sweep([sweep], sweep)
            written = perf_counter() - started - read
            sizes = [(sweep / name).stat().st_size / 2**20 for name in ("report.html", "sweep.csv")]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            cells = (str(count), f"{read:.1f}", f"{written:.1f}", *(f"{size:.2f}" for size in sizes), f"{peak:.0f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def copy_runs(run: Path, folder: Path, count: int) -> Path:
    """Return a sweep's folder with copies of a finished run, each with its seed and learning rate."""
    config = yaml.safe_load((run / CONFIG).read_text(encoding="utf-8"))
    for number in range(count):
        config["seed"], config["optim"]["lr"] = number % SEEDS, 1e-4 * (1 + number // SEEDS)
        copy = folder / f"optim.lr={config['optim']['lr']:g},seed={config['seed']}"
        copy.mkdir()
        for name in (*SEALED, "choices.json"):
            if (run / name).exists():
                shutil.copy2(run / name, copy / name)
        (copy / CONFIG).write_text(yaml.safe_dump(config), encoding="utf-8")
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8")) | {"seed": config["seed"]}
        (copy / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
        seal(copy)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(count) for count in sys.argv[2:]])
