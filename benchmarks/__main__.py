"""`make bench`: run all benchmarks in turn, and write benchmarks/results/CPU.md and CPU.json. Start at `main`.

Each processor has its own files, since the ratios depend on it: routines of the reference are fastest on some.
"""

import json
import logging
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from benchmarks import defenses, generation, starting, training, workers
from benchmarks.setting import Result, Rows, embedded_model, machine
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Run all benchmarks and write both files."""
    _silence_libraries()
    started = perf_counter()
    folder = embedded_model()
    rows = Rows(folder)
    results: list[Result] = []

    def add(*new: Result) -> None:
        for result in new:
            results.append(result)
            print(f"[{perf_counter() - started:4.0f} s] {_line(result)}", flush=True)

    add(*starting.command_line(), starting.model(folder))
    add(*workers.measure(folder, rows))
    keep_freed_memory()  # as every run does
    ours = training.Ours(training.adapted(folder), training.lisa())
    add(*training.rate(ours, rows), training.lisa_against_sft(ours, rows))
    overhead, profile = training.fit_against_bare(ours, folder, rows)
    add(overhead)
    del ours
    add(*defenses.measure(folder, rows))
    add(*generation.measure(folder, rows), *starting.million_rows(rows))

    seconds = perf_counter() - started
    name = re.sub(r"\W+", "-", re.sub(r"\(\w+\)", "", machine()["cpu"])).strip("-").lower()
    write_text(RESULTS / f"{name}.md", _table(results, profile, seconds))
    report = {"machine": machine(), "seconds": seconds, "profile": profile, "results": [asdict(r) for r in results]}
    write_text(RESULTS / f"{name}.json", json.dumps(report, indent=2) + "\n")
    print(f"{seconds:.0f} s; {RESULTS / name}.md")


def _line(result: Result) -> str:
    """Return a result as a line of the table."""
    sign = "≥" if result.better == "higher" else "≤"
    target, met = "–", "–"
    if result.target is not None:
        target, met = f"{sign} {result.target:g}", "yes" if result.met else "**no**"
    return f"| {result.what} | {result.measured:.3g} {result.unit} | {target} | {met} | {result.note} |"


def _table(results: list[Result], profile: dict[str, float], seconds: float) -> str:
    """Return the results and the profile of a training step as Markdown."""
    host = machine()
    about = (
        f"{host['cpu']}, {host['cores']} cores, {host['memory_gib']} GiB, {host['instructions']}; "
        f"Python {host['python']}, torch {host['torch']} with {host['threads']} threads"
    )
    step = sum(profile.values())
    profile_lines = [f"| {name} | {1000 * s:.1f} | {100 * s / step:.1f} |" for name, s in profile.items()]
    return "\n".join(
        [
            f"Measured by `make bench` in {seconds / 60:.0f} minutes on: {about}. Medians. The reference, run in turn "
            "with ours, is a plain form of the published implementations ([reference.py](../reference.py)).",
            "",
            "| what | measured | target | met | how |",
            "|---|---|---|---|---|",
            *map(_line, results),
            "",
            f"Time of a training step by part (batch 5, {1000 * step:.0f} ms, without Trainer.fit's share):",
            "",
            "| part | ms | % |",
            "|---|---|---|",
            *profile_lines,
            "",
        ]
    )


def _silence_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
