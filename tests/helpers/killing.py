"""Kills real runs with SIGKILL at chosen moments, resumes them, and reports the results; used by test_killed.py.

    python -m helpers.killing FOLDER    (in tests/)

Forks a child per run, so that one costs seconds. Prints a JSON object: chain -> {statuses, differing, asked, steps}.
"""

import csv
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.forking import fork, wait, warm_up

WHOLE = [
    "experiment=smoke",
    "method.alignment_steps=2",
    "method.user_steps=4",
    "optim.steps=16",
    "align.optim.steps=5",
    "checkpoint.every=3",
    "evaluate.every=8",
]
Patch = Callable[[], None]


def die() -> None:
    """End this process by SIGKILL, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, due: Callable[..., bool], after: bool = False) -> None:
    """Replace a function by one that dies when `due(*arguments)`, before or after doing its work."""
    original = getattr(owner, name)

    def fatal(*args: Any, **kwargs: Any) -> Any:
        now = due(*args, **kwargs)
        if now and not after:
            die()
        result = original(*args, **kwargs)
        if now:
            die()
        return result

    setattr(owner, name, fatal)


def nth(n: int) -> Callable[..., bool]:
    """Return a condition that is true at its n-th call."""
    count = 0

    def due(*_: Any, **__: Any) -> bool:
        nonlocal count
        count += 1
        return count == n

    return due


def moments() -> dict[str, tuple[list[str], list[Patch]]]:
    """Return overrides of runs, and the moments of any run at which they are killed, in the order of a run.

    Cycles have 2 alignment and 4 user steps, after 5 steps of aligning. Checkpoints are written every third step, and a
    killed run goes on from them.
    """
    from lisa_lightning.evaluation import evaluator, generator, judging
    from lisa_lightning.logger.curves import Curves
    from lisa_lightning.method.base import Method
    from lisa_lightning.pipeline import run as pipeline
    from lisa_lightning.pipeline.stages import finetune
    from lisa_lightning.runtime import cache
    from lisa_lightning.trainer import checkpoint_io, module
    from lisa_lightning.trainer.module import LisaModule

    def at_a_switch(method: Method, t: int, *_: Any) -> bool:
        return method.schedule.alignment_steps == 2 and t == 8

    trained: list[Patch] = [
        lambda: at_call(LisaModule, "training_step", step(16, 1)),  # before the first checkpoint
        lambda: at_call(checkpoint_io.torch, "save", nth(2), after=True),  # which has no name yet
        lambda: at_call(LisaModule, "training_step", step(16, 7)),  # inside the alignment state
        lambda: at_call(module, "move_anchor", at_a_switch, after=True),
        lambda: at_call(Curves, "log", nth(4)),
        lambda: at_call(finetune, "save_adapter", nth(1), after=True),
        lambda: at_call(cache, "_finalize", nth(1)),  # before the finished stage gets its name
    ]
    evaluated: list[Patch] = [
        lambda: at_call(generator, "generate", nth(2)),
        lambda: at_call(evaluator, "_append", lambda path, answers: answers[0].model == "final", after=True),
        lambda: at_call(judging, "_verdict_line", nth(5)),
        lambda: at_call(pipeline, "write_report", nth(1)),
    ]
    return {"training": (WHOLE, trained), "evaluating, judging, reporting": ([*WHOLE, "evaluate.every=0"], evaluated)}


def step(steps: int, index: int) -> Callable[..., bool]:
    """Return a condition that is true at step `index` of a training of `steps` steps."""
    return lambda module, batch, _: module.optim.steps == steps and batch.index == index


SHORT = [
    *("experiment=smoke", "align.optim.steps=5", "optim.steps=7", "checkpoint.every=2", "evaluate.every=0"),
    *(
        "lora.dropout=0.1",
        "align.lora.dropout=0.1",
        "data.max_length=400",
        "source.alignment.take=60",
        "source.defender.take=30",
    ),
]
T_VACCINE = ["align=t_vaccine", "align.method.active_layers=1", "align.method.interval_steps=3"]
REFERENCE = ["repair.reference.sft.optim.steps=3", "repair.reference.dpo.optim.steps=4"]


def chains() -> dict[str, tuple[list[str], list[Patch]]]:
    """Return one run per chain, of defenses with a state of their own, and the moments at which it is killed.

    The states of all methods pass through checkpoints in tests/method/test_laws.py.
    """
    from lisa_lightning.curate.seal import SEAL
    from lisa_lightning.evaluation import judging
    from lisa_lightning.objective import similarity
    from lisa_lightning.pipeline import stage_sequence
    from lisa_lightning.pipeline.stages import edit, filter, finetune, outliers
    from lisa_lightning.repair import nlsr
    from lisa_lightning.trainer.module import LisaModule

    def training(steps: int, index: int) -> Patch:
        return lambda: at_call(LisaModule, "training_step", step(steps, index))

    return {
        "seal, t_vaccine, asft, nlsr": (
            [
                *SHORT,
                "stages=[curate,align,finetune,repair]",
                *("curate=seal", "curate.epochs=1", "method=asft", "repair=nlsr"),
                *T_VACCINE,
                *REFERENCE,
            ],
            [
                lambda: at_call(SEAL, "fit_weights", nth(2)),
                training(5, 3),
                training(4, 3),
                lambda: at_call(nlsr, "_replace", nth(1)),
            ],
        ),
        "outliers, filter": (
            [
                *SHORT,
                *("stages=[align,finetune]", "attack=benign_outlier", "attack.count=20", "attack.reference_rows=5"),
                *("filter=embedded", "source.train.take=40"),
            ],
            [
                lambda: at_call(outliers, "prompt_embeddings", nth(2)),
                lambda: at_call(outliers, "write_text", nth(1), after=True),
                lambda: at_call(judging, "_verdict_line", nth(5)),
                lambda: at_call(filter, "write_text", nth(1), after=True),
                training(7, 3),
            ],
        ),
        "outliers by gradient": (
            [
                *SHORT,
                *("stages=[align,finetune]", "attack=benign_outlier", "attack.count=5", "attack.reference_rows=3"),
                *("attack.by=gradient", "source.train.take=9"),
            ],
            [
                lambda: at_call(similarity, "_row_gradient", nth(7)),
                lambda: at_call(outliers, "write_text", nth(1)),
            ],
        ),
        "edit": (
            [*SHORT, "stages=[align,finetune]", "method=sft", "attack=abliterate", "attack.count=6"],
            [
                lambda: at_call(edit, "last_states", nth(2)),
                lambda: at_call(edit, "save_adapter", nth(1), after=True),
                lambda: at_call(stage_sequence, "_copy_adapter", nth(1)),
            ],
        ),
        "lisa on all weights": (
            [
                *("experiment=smoke", "stages=[align,finetune]", "lora=null", "align.optim.steps=2", "optim.steps=7"),
                *("checkpoint.every=2", "evaluate.every=0", "method.alignment_steps=2", "method.user_steps=2"),
            ],
            [
                training(7, 3),
                lambda: at_call(finetune, "save_full", nth(1), after=True),
                lambda: at_call(stage_sequence, "_link_model", nth(1), after=True),
            ],
        ),
    }


def chain(overrides: list[str], patches: list[Patch], work: Path) -> dict[str, Any]:
    """Compare a straight run with one that is killed and resumed again and again.

    Returns the exit statuses and the names of files that differ. The numbers of generated answers of both runs and the
    steps of the straight run's curves are returned too.
    """
    work.mkdir()
    statuses = [run(work / "straight", work / "cache", None, overrides)]
    shutil.rmtree(work / "cache")
    for i, patch in enumerate([*patches, None]):
        statuses.append(run(work / "killed", work / "cache", patch, [*overrides, *(["resume=true"] if i else [])]))
    if statuses[0] or statuses[-1]:
        return {"statuses": statuses, "log": "".join(f.read_text()[-2000:] for f in work.glob("*.err"))}
    one, other = (left(work / out) for out in ("straight", "killed"))
    asked = [(work / f"{out}.asked").stat().st_size for out in ("straight", "killed")]
    differing = [name for name in one if one[name] != other[name]]
    steps = [(row["stage"], int(row["step"])) for row in one["curves"]]
    return {"statuses": statuses, "differing": differing, "asked": asked, "steps": steps}


def run(out: Path, cache: Path, patch: Patch | None, overrides: list[str]) -> int:
    """Execute one run in a child process, without a report.

    Returns its exit status, or minus the signal that ended it.
    """

    def patched() -> None:
        from lisa_lightning.pipeline import run_folder

        run_folder.write_page = lambda *_: []  # type: ignore[assignment]
        note_answers(out.with_name(f"{out.name}.asked"))
        if patch is not None:
            patch()

    arguments = [*overrides, f"hydra.run.dir={out}", f"cache_dir={cache}"]
    return wait(fork(arguments, out.parent / out.name, patched))


def left(out: Path) -> dict[str, Any]:
    """Return the files that a run leaves: its results as bytes, and curves without seconds."""
    with (out / "curves.csv").open(newline="") as file:
        curves = [{k: v for k, v in row.items() if k != "time/step_s"} for row in csv.DictReader(file)]
    files = [*out.glob("adapter/*"), *out.glob("model/*"), out / "responses.jsonl", out / "judged.jsonl"]
    return {"curves": curves} | {file.name: file.read_bytes() for file in files if file.exists()}


def note_answers(file: Path) -> None:
    """Let every generated answer add a byte to the file."""
    from lisa_lightning.evaluation import evaluator

    file.touch()
    original = evaluator._append

    def noting(path: Path, answers: Any) -> None:
        with file.open("a") as note:
            note.write("." * len(answers))
        original(path, answers)

    evaluator._append = noting


def main(work: Path) -> None:
    """Execute all chains, and print their results."""
    os.environ |= {"WANDB_MODE": "disabled", "HYDRA_FULL_ERROR": "1"}
    os.chdir(work)
    warm_up()
    made = {**moments(), **chains()}
    print(json.dumps({name: chain(*asked, work / str(i)) for i, (name, asked) in enumerate(made.items())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
