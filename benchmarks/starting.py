"""Start-up benchmarks: `command_line`, `model`, and the first step over a million rows (`million_rows`)."""

import csv
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

from benchmarks.setting import REPETITIONS, ROOT, Result, Rows, embedded_model, spread
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.runtime.memory import resident_peak_mib

STEPS = 12


def command_line() -> list[Result]:
    """Measure processes that end before any training."""
    results = []
    for what, arguments, status in (
        ("python run.py --help", ["--help"], 0),
        ("a refused config (optim.lr=-1)", ["optim.lr=-1"], 2),
    ):
        command = [sys.executable, "run.py", *arguments]
        seconds = [_seconds(lambda c=command, s=status: _expect_exit(c, s)) for _ in range(REPETITIONS)]
        results.append(Result(what, median(seconds), 2.5, "lower", "s", spread(seconds)))
    return results


def model(folder: Path) -> Result:
    """Measure loading of the embedded model and its tokenizer from the cache folder."""
    seconds = [_seconds(lambda: (load(folder, "float32"), load_tokenizer(folder))) for _ in range(REPETITIONS)]
    return Result("the embedded model from its cache to ready", median(seconds), 3.0, "lower", "s", spread(seconds))


def million_rows(rows: Rows) -> list[Result]:
    """Compare a run over 1,000,000 user rows with one over 1,000. Each runs once, since it takes a minute."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = _Run(folder / "few", _write(folder / "few.tsv", rows, 1_000), 1_000)
        many = _Run(folder / "many", _write(folder / "many.tsv", rows, 1_000_000), 1_000_000)
    step = 100 * (many.step / few.step - 1)
    return [
        Result(
            "1,000,000 user rows on disk: first step after",
            many.first_step,
            60.0,
            "lower",
            "s",
            f"from the command on; {few.first_step:.0f} s with 1,000 rows",
        ),
        Result(
            "1,000,000 user rows: memory beyond that of 1,000",
            many.memory - few.memory,
            2.0,
            "lower",
            "GiB",
            f"peaks {many.memory:.2f} and {few.memory:.2f} GiB",
        ),
        Result(
            "1,000,000 user rows: a step, dearer than with 1,000",
            step,
            10.0,
            "lower",
            "%",
            f"{many.step:.2f} and {few.step:.2f} s, loading included, one run each",
        ),
    ]


def _write(file: Path, rows: Rows, count: int) -> Path:
    """Write rows like those of SST-2, made unique by a number, and return the file."""
    rng = random.Random(0)
    sentences = [row.context for row in rows.test]
    with file.open("w", encoding="utf-8") as out:
        out.write("sentence\tlabel\n")
        out.writelines(f"{rng.choice(sentences)} {i}\t{i % 2}\n" for i in range(count))
    return file


class _Run:
    """A process with `stages=[finetune]` and SFT over the rows of a file: peak memory in GiB, seconds of steps."""

    def __init__(self, out: Path, rows: Path, count: int) -> None:
        embedded = ("alignment", "harmful", "harmful_prompts")
        command = [
            *(sys.executable, "run.py", "experiment=sst2_sft", "source=local", "stages=[finetune]", "harmful_ratio=0"),
            *(f"data.n={count}", f"optim.steps={STEPS}", "evaluate.every=0", f"hydra.run.dir={out}"),
            *(f"source.train.path={rows}", "source.test.path=embedded:sst2_mini_test.jsonl"),
            *(f"source.{name}.path=embedded:{name}.jsonl" for name in embedded),
        ]
        started = perf_counter()
        log = out.parent / f"{out.name}.log"
        environment = os.environ | {"WANDB_MODE": "offline", "LISA_CACHE": str(_separate_cache(out))}
        with log.open("w") as text:
            process = subprocess.Popen(command, cwd=ROOT, stdout=text, stderr=text, env=environment)
        self.memory = 0.0
        ends: list[float] = []  # times at which steps ended, to a tenth of a second
        while process.poll() is None:
            sleep(0.1)
            self.memory = max(self.memory, resident_peak_mib(process.pid) / 1024)
            ends += [perf_counter() - started] * (len(_rows(out / "curves.csv")) - len(ends))
        if process.returncode != 0:
            raise SystemExit(log.read_text()[-2000:])
        self.first_step = ends[0]
        self.step = (ends[-1] - ends[1]) / (STEPS - 2)


def _separate_cache(out: Path) -> Path:
    """Return a cache that holds the converted model only, so that the stage runs."""
    cache = out.parent / "cache"
    (cache / "models").mkdir(parents=True, exist_ok=True)
    link = cache / "models" / embedded_model().name
    if not link.exists():
        link.symlink_to(embedded_model(), target_is_directory=True)
    return cache


def _rows(curves: Path) -> list[dict[str, str]]:
    """Return the rows of finished steps, [] before the file exists."""
    if not curves.exists():
        return []
    with curves.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("time/step_s")]


def _expect_exit(command: list[str], status: int) -> None:
    """Run a command. Raises SystemExit if its exit status is another."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != status:
        raise SystemExit(f"{command}: exit status {done.returncode}\n{done.stderr[-1000:]}")


def _seconds(call: Callable[[], object]) -> float:
    started = perf_counter()
    call()
    return perf_counter() - started
