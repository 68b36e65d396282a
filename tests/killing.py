"""Kills real runs with SIGKILL at chosen moments, resumes them, and reports what came out; used by test_killed.py.

    python tests/killing.py moments|chains FOLDER

Forks a child per run, so that a scenario costs seconds. Prints a JSON object: of moments, scenario -> {killed, resumed,
adapter, curves}; of chains, defenses -> {statuses, differing}.
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

from forking import fork, import_everything, wait

OVERRIDES = [
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
    """What `kill -9` does."""
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
    """True at the n-th call."""
    count = 0

    def due(*_: Any, **__: Any) -> bool:
        nonlocal count
        count += 1
        return count == n

    return due


def scenarios() -> dict[str, Patch]:
    """The moments; smoke runs in cycles of 2 alignment and 4 user steps, 5 steps of aligning before."""
    from lisa_lightning import cache, pipeline, training
    from lisa_lightning.curves import Curves
    from lisa_lightning.evaluate import evaluator, judging
    from lisa_lightning.method.method import Method
    from lisa_lightning.module import LisaModule
    from lisa_lightning.stages import finetune

    return {
        "while aligning": lambda: at_call(LisaModule, "training_step", step(5, 4)),
        "inside the user state": lambda: at_call(LisaModule, "training_step", step(16, 10)),
        "inside the alignment state": lambda: at_call(LisaModule, "training_step", step(16, 7)),
        "at a switch": lambda: at_call(
            Method, "before_step", lambda m, t, _: m.total_steps == 16 and t == 8, after=True
        ),
        "before the first checkpoint": lambda: at_call(LisaModule, "training_step", step(16, 1)),
        "while a checkpoint is written": lambda: at_call(training.torch, "save", nth(3), after=True),
        "while a curve row is written": lambda: at_call(Curves, "append", nth(9)),
        "while evaluating the aligned model": lambda: at_call(evaluator, "generate", nth(2)),
        "while evaluating the final model": lambda: at_call(evaluator, "_append", nth(3), after=True),
        "while the adapter is saved": lambda: at_call(finetune, "save_adapter", nth(1), after=True),
        "before the finished stage gets its name": lambda: at_call(cache, "_complete", nth(2)),
        "while judging": lambda: at_call(judging, "_verdict_line", nth(5)),
        "while the report is written": lambda: at_call(pipeline, "_leave", nth(1)),
    }


def step(steps: int, index: int) -> Callable[..., bool]:
    """True at a step of a training of so many."""
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
TRAINING = [*SHORT, "stages=[align,finetune]"]
T_VACCINE = ["align=t_vaccine", "align.method.active_layers=1", "align.method.interval_steps=3"]
REFERENCE = ["repair.reference.sft.optim.steps=3", "repair.reference.dpo.optim.steps=4"]


def chains() -> dict[str, tuple[list[str], list[Patch]]]:
    """Defenses by what is asked for, and the moments, one in each go, at which they are killed."""
    from lisa_lightning.curate.seal import SEAL
    from lisa_lightning.module import LisaModule
    from lisa_lightning.repair import nlsr
    from lisa_lightning.stages import repair

    def training(steps: int, index: int) -> Patch:
        return lambda: at_call(LisaModule, "training_step", step(steps, index))

    both = [training(5, 3), training(7, 5)]
    return {
        "vaccine, ewc": ([*TRAINING, "align=vaccine", "method=ewc"], both),
        "t_vaccine, ldifs": ([*TRAINING, *T_VACCINE, "method=ldifs"], both),
        "repnoise, constrained_sft": ([*TRAINING, "align=repnoise", "method=constrained_sft"], both),
        "booster, vlguard_loss": ([*TRAINING, "align=booster", "method=vlguard_loss"], both),
        "booster with vaccine, asft": ([*TRAINING, "align=booster", "align.method.rho=1", "method=asft"], both),
        "proximal, antidote": (
            [*SHORT, "stages=[align,finetune,repair]", "method=proximal", "repair=antidote"],
            [training(7, 5), lambda: at_call(repair, "save_adapter", nth(1))],
        ),
        "seal, vlguard, nlsr": (
            [
                *SHORT,
                "stages=[curate,align,finetune,repair]",
                "curate=seal",
                "curate.epochs=1",
                "method=vlguard",
                "repair=nlsr",
                *REFERENCE,
            ],
            [
                lambda: at_call(SEAL, "trained", nth(2)),
                training(4, 3),
                lambda: at_call(nlsr, "_replace", nth(1)),
            ],
        ),
    }


def chain(overrides: list[str], patches: list[Patch], work: Path) -> dict[str, Any]:
    """A straight run, and one that is killed and resumed again and again: exit statuses, and the files that differ."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    statuses = [run(work / "straight", work / "cache", None, overrides)]
    shutil.rmtree(work / "cache")
    for i, patch in enumerate([*patches, None]):
        statuses.append(run(work / "killed", work / "cache", patch, [*overrides, *(["resume=true"] if i else [])]))
    if statuses[0] or statuses[-1]:
        return {"statuses": statuses, "log": "".join(f.read_text()[-2000:] for f in work.glob("*.err"))}
    left = [{"adapter": adapter(work / out), "curves": curves(work / out)} for out in ("straight", "killed")]
    return {"statuses": statuses, "differing": [name for name in left[0] if left[0][name] != left[1][name]]}


def run(out: Path, cache: Path, patch: Patch | None, overrides: list[str]) -> int:
    """One run, without a report, in a child process; its exit status, or minus the signal that ended it."""

    def patched() -> None:
        from lisa_lightning import pipeline

        pipeline._page = lambda *_: []  # type: ignore[assignment]
        if patch is not None:
            patch()

    arguments = [*overrides, f"hydra.run.dir={out}", f"cache_dir={cache}"]
    return wait(fork(arguments, out.parent / out.name, patched))


def adapter(out: Path) -> dict[str, str]:
    """The adapter's files, byte by byte."""
    return {f.name: f.read_bytes().hex() for f in sorted((out / "adapter").iterdir())}


def curves(out: Path) -> list[dict[str, str]]:
    """The curves but for the seconds."""
    with (out / "curves.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "time/step_s"} for row in csv.DictReader(file)]


def note_answers(file: Path) -> None:
    """Have every answer that is generated add a byte to the file."""
    from lisa_lightning.evaluate import evaluator

    original = evaluator._append

    def noting(path: Path, answers: Any) -> None:
        with file.open("a") as note:
            note.write("." * len(answers))
        original(path, answers)

    evaluator._append = noting


def scenario(name: str, patch: Patch | None, work: Path) -> dict[str, Any]:
    """Kill, resume, and what is left; `asked` counts the answers that the run or its resumption generated.

    What comes after aligning finds the aligned model of the straight run, the first.
    """
    cache, out = work / "cache", work / name.replace(" ", "_")
    if patch and name != "while aligning":
        for stage in cache.iterdir():
            if stage.name not in ("models", "align"):
                shutil.rmtree(stage)
    else:
        shutil.rmtree(cache, ignore_errors=True)
    killed = run(out, cache, patch, OVERRIDES) if patch else -signal.SIGKILL
    lines = (out / "responses.jsonl").read_text().splitlines() if (out / "responses.jsonl").exists() else []
    asked = work / f"{out.name}.asked"
    asked.touch()
    resumed = run(out, cache, lambda: note_answers(asked), [*OVERRIDES, *(["resume=true"] if patch else [])])
    if resumed != 0:
        return {"killed": killed, "resumed": resumed, "log": (work / f"{out.name}.err").read_text()[-3000:]}
    left = {"adapter": adapter(out), "curves": curves(out)}
    left |= {name: (out / f"{name}.jsonl").read_text() for name in ("responses", "judged")}
    return {"killed": killed, "resumed": resumed, "answered": len(lines), "asked": asked.stat().st_size} | left


def main(what: str, work: Path) -> None:
    """All moments, the uninterrupted run first; or all chains."""
    os.environ |= {"WANDB_MODE": "disabled", "HYDRA_FULL_ERROR": "1"}
    os.chdir(work)
    import_everything()
    if what == "chains":
        found = {name: chain(*asked, work / name.replace(", ", "_")) for name, asked in chains().items()}
    else:
        moments = scenarios()
        found = {"straight": scenario("straight", None, work)}
        for name, patch in moments.items():
            found[name] = scenario(name, patch, work)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
