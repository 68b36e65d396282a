"""Peak memory of a training step, in a process of its own: `python -m benchmarks.memory ours|theirs`."""

import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks.setting import REPETITIONS, Result, Rows, embedded_model, spread

STATUS = Path("/proc/self/status")


def peak_mib(form: str) -> float:
    """Peak resident memory of this process while it makes two steps of batch 16, model included."""
    from benchmarks import training

    folder = embedded_model()
    rows = Rows(folder).sst2
    trainer = training.Ours(folder, training.lisa()) if form == "ours" else training.Theirs(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for i in range(2):
        trainer.step(training.batch(rows, 16, i))
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure() -> Result:
    """Ours as a share of the reference's."""
    shares, peaks = [], []
    for _ in range(REPETITIONS):
        found = {form: _in_a_process(form) for form in ("ours", "theirs")}
        shares.append(found["ours"] / found["theirs"])
        peaks.append(found)
    note = f"{median(p['ours'] for p in peaks):.0f} of {median(p['theirs'] for p in peaks):.0f} MiB, model included"
    return Result(
        "peak memory of a training step, batch 16",
        median(shares),
        0.45,
        "lower",
        "of the reference's",
        f"{note}; {spread(shares)}",
    )


def _in_a_process(form: str) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", form]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    from lisa_lightning.cpu import keep_freed_memory

    if sys.argv[1] == "ours":
        keep_freed_memory()
    print(peak_mib(sys.argv[1]))
