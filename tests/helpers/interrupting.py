"""Interrupts real runs at chosen moments, as Ctrl-C and SIGTERM do, and reports how they end; for test_interrupted.py.

    python -m helpers.interrupting FOLDER    (in tests/)

Prints a JSON object: moment -> {status, err, again}, where `again` is the status of the same command resumed.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.forking import fork, wait, warm_up
from helpers.killing import nth

SHORT = ["experiment=smoke", "optim.steps=4", "align.optim.steps=3", "evaluate.every=3", "checkpoint.every=2"]


def at_call(owner: Any, name: str, number: signal.Signals, call: int = 1) -> None:
    """Replace a function by one that sends this process a signal before its n-th call."""
    original, due = getattr(owner, name), nth(call)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if due():
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(owner, name, interrupted)


def moments() -> dict[str, tuple[signal.Signals, Callable[[], None]]]:
    """Return the signal of each moment, and the patch that sends it."""
    from lisa_lightning.evaluation import generator, judging
    from lisa_lightning.model import base_model
    from lisa_lightning.pipeline import preflight, run_folder
    from lisa_lightning.trainer import module

    places: dict[str, tuple[Any, str, int]] = {
        "making the model": (base_model, "_save_tiny_model", 1),
        "the dry run": (preflight, "_try_defenses", 1),
        "fine-tuning": (module, "move_anchor", 5),
        "a point of the curves": (generator, "generate", 5),
        "evaluating": (generator, "generate", 1),
        "judging": (judging, "_verdict_line", 3),
        "the page": (run_folder, "write_page", 1),
    }
    numbers = dict.fromkeys(places, signal.SIGINT) | dict.fromkeys(
        ("the dry run", "a point of the curves"), signal.SIGTERM
    )
    return {
        f"{name} by {number.name}": (
            number,
            lambda place=places[name], number=number: at_call(*place[:2], number, place[2]),
        )
        for name, number in numbers.items()
    }


def run(work: Path, arguments: list[str], patch: Callable[[], None] | None) -> tuple[int, str]:
    """Return the exit status and the output of a run, with both streams in the order of a terminal."""
    work.mkdir(exist_ok=True)
    log = work / f"log{len(list(work.glob('*.err')))}"

    def patched() -> None:
        os.dup2(1, 2)
        if patch is not None:
            patch()

    status = wait(fork(arguments, log, patched))
    return status, Path(f"{log}.out").read_text()


def main(work: Path) -> None:
    """Interrupt a run at each moment, and a sweep."""
    os.environ |= {"WANDB_MODE": "disabled", "HYDRA_FULL_ERROR": "1"}
    warm_up()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    report: dict[str, Any] = {}
    for index, (name, (_, patch)) in enumerate(moments().items()):
        folder = work / str(index)
        arguments = [*SHORT, f"cache_dir={folder / 'cache'}", f"hydra.run.dir={folder / 'out'}"]
        status, output = run(folder, arguments, patch)
        again = run(folder, [*arguments, "resume=true"], None)[0] if name.startswith("evaluating") else 0
        report[name] = {"status": status, "output": output, "again": again}
    folder = work / "diverging"
    lr = [
        "align.optim.lr=1e30",
        "data.max_length=210",
        f"cache_dir={folder / 'cache'}",
        f"hydra.run.dir={folder / 'out'}",
    ]
    status, output = run(folder, [*SHORT, *lr], None)
    report["a loss that is no number"] = {"status": status, "output": output}
    folder = work / "sweep"
    sweep = ["-m", *SHORT, "seed=1,2", f"cache_dir={folder / 'cache'}", f"hydra.sweep.dir={folder / 'out'}"]
    status, output = run(folder, sweep, moments()["fine-tuning by SIGINT"][1])
    report["a sweep by SIGINT"] = {"status": status, "output": output, "again": run(folder, sweep, None)[0]}
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
