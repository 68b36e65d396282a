"""A run in Weights & Biases, online or offline: its name and tags, and its curves, which go to `curves.csv` too."""

import json
import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lisa_lightning.config.rules import quoted
from lisa_lightning.config.validate import flat
from lisa_lightning.logger.curves import CurveRow, Curves
from lisa_lightning.logger.run_name import identity
from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import read_json, write_text

log = logging.getLogger(__name__)

AXES = {"finetune": "trainer/global_step", "align": "stage/align_step"}
"""The stages with curves, and W&B's x axis of each, which counts its optimizer steps."""
LONGEST_TAG = 64  # characters; W&B refuses longer ones
LONGEST_NAME = 128  # of a run and of a group
INTERVALS = ("_low", "_high", "_answers")
"""What stands beside a score in curves.csv; as charts of their own they would bury it."""


class Tracker:
    """Logs every step once, to `curves.csv` and to W&B; x axis is the optimizer step.

    Args:
        out: the output folder.
        wandb_init: what `wandb.init` is told (project, group, job type, tags, name, config).
        resumed: whether an earlier run in `out` goes on.
    """

    def __init__(self, out: Path, wandb_init: dict[str, Any], resumed: bool) -> None:
        self.curves = Curves(out / "curves.csv")
        self.out = out
        self.run, self.logged = _start_wandb(out, wandb_init, resumed)
        self._drawn: set[str] = set()

    def start(self, stage: str, step: int) -> None:
        """A stage begins, or goes on after `step` finished steps: later rows are dropped, earlier ones kept."""
        self.curves.forget(stage, step)
        if self.logged.get(stage, -1) < step:
            for row in self.curves.rows(stage):
                self._to_wandb(stage, int(row["step"]), _numbers(row))

    def log(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        """One row of the curves."""
        self.curves.append(stage, step, metrics)
        self._to_wandb(stage, step, metrics)

    def take_over(self, rows: Sequence[CurveRow]) -> None:
        """The curves of a stage that was found finished in the cache."""
        if not rows:
            return
        stage = rows[0]["stage"]
        if [_numbers(r) for r in self.curves.rows(stage)] != [_numbers(r) for r in rows]:
            self.curves.insert(rows)
        for row in rows:
            self._to_wandb(stage, int(row["step"]), _numbers(row))

    def _to_wandb(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        if self.run is None or step <= self.logged.get(stage, -1):
            return
        metrics = {_of_stage(stage, k): v for k, v in metrics.items() if not k.endswith(INTERVALS)}
        for prefix in {name.partition("/")[0] for name in metrics} - self._drawn:
            self.run.define_metric(f"{prefix}/*", step_metric=AXES[stage])
            self._drawn.add(prefix)
        self.run.log(metrics | {AXES[stage]: step})
        self.logged[stage] = step

    def summarize(self, metrics: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Final numbers and a table of sample answers."""
        if self.run is None:
            return
        import wandb

        self.run.summary.update(metrics)
        if samples:
            columns = list(samples[0])
            self.run.log({"answers": wandb.Table(columns=[*columns], data=[[s[c] for c in columns] for s in samples])})

    def finish(self, failed: bool) -> None:
        """Close the W&B run; a failed one is marked as such."""
        if self.run is not None:
            self.run.finish(exit_code=1 if failed else 0)

    @property
    def url(self) -> str | None:
        """Where an online run is shown."""
        return None if self.run is None or self.offline_folder is not None else self.run.url

    @property
    def offline_folder(self) -> str | None:
        """The folder of an offline run, for `wandb sync` and `wandb leet`."""
        if self.run is None or not self.run.settings.mode.startswith("offline"):
            return None
        return str(Path(self.run.dir).parent)


def wandb_init(cfg: dict[str, Any], choices: dict[str, str], name: str | None = None) -> dict[str, Any]:
    """What `wandb.init` is told of a run: config as nested columns, and a group, name and tags to find it by.

    An experiment is named after how it fine-tunes, so that it is no name for a run that doesn't.

    Args:
        cfg: the resolved config.
        choices: config group -> the chosen file.
        name: of the run, if it has one: a job of a sweep has.
    """
    own = identity(dict(flat(cfg)), choices)
    kind = "-".join(own.words)
    experiment = choices.get("experiment", "None")
    group = own.words[0] if not own.tuned else experiment if experiment != "None" else "run"
    about = f"p{cfg['harmful_ratio']}" if own.tuned else own.model
    return {
        "project": cfg["wandb"]["project"],
        "group": _short(cfg["wandb"]["group"] or group),
        "job_type": kind,
        "name": _short(name or f"{kind}-{about}-seed{cfg['seed']}"),
        "tags": [*own.words, own.task, own.model[:LONGEST_TAG], *cfg["wandb"]["tags"]],
        "config": cfg | {"choices": choices},
    }


def _short(name: str) -> str:
    """Beginning and end of a name that W&B would refuse."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def _of_stage(stage: str, name: str) -> str:
    """A curve's name in W&B: fine-tuning's as it is, aligning's as align/loss, align/booster_reduction."""
    if stage == "finetune":
        return name
    return f"{stage}/{name.removeprefix('train/').removeprefix('time/').replace('/', '_')}"


def _numbers(row: CurveRow) -> dict[str, float]:
    return {k: float(v) for k, v in row.items() if k not in ("stage", "step") and v != ""}


def _start_wandb(out: Path, init: dict[str, Any], resumed: bool) -> tuple[Any, dict[str, int]]:
    """The W&B run and, where an online run goes on, the last step that it already holds of each stage."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return None, {}
    import wandb

    record = out / "wandb.json"
    earlier = _earlier_run(record) if resumed else None
    online = _has_api_key() and os.environ.get("WANDB_MODE", "online") == "online"
    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    run, goes_on = None, {}
    if online:
        goes_on = {"id": earlier["id"], "resume": "must"} if earlier and earlier["online"] else {}
        try:
            run = wandb.init(dir=out, mode="online", settings=settings, **init, **goes_on)
        except (wandb.Error, ValueError, OSError) as error:
            log.warning("W&B can't be reached (%s): the run is kept offline.", printable(first_line(error))[:200])
            online = False
    if run is None:
        goes_on = {}
        if earlier:
            init = init | {"config": init["config"] | {"resumed_from": earlier["id"]}}
            log.warning("W&B can't continue an offline run: a new one starts with the curves of %s.", earlier["id"])
        try:
            run = wandb.init(dir=out, mode="offline", settings=settings, **init)
        except (wandb.Error, ValueError, OSError) as error:
            raise UserError(
                f"W&B can't start a run ({printable(first_line(error))[:200]}). Fix: set WANDB_MODE=disabled"
            ) from error
    for axis in AXES.values():
        run.define_metric(axis, hidden=True)
    write_text(record, json.dumps({"id": run.id, "online": online}))
    logged = {s: int(v) for s, v in _last_steps(run).items()} if goes_on else {}
    return run, logged


def _earlier_run(record: Path) -> dict[str, Any] | None:
    """Return id and kind of the W&B run that an interrupted run had, None where there was none.

    Raises:
        UserError: if wandb.json is broken.
    """
    fix = "delete it; a new W&B run then starts with all curves so far"
    earlier = read_json(record, fix)
    if earlier and not (isinstance(earlier.get("id"), str) and isinstance(earlier.get("online"), bool)):
        raise UserError(f"{record} names no W&B run. Fix: {fix}")
    return earlier or None


def refuse_wandb_environment() -> None:
    """Check the `WANDB_` variables of the environment, as W&B would when a run starts.

    Raises:
        UserError: if a variable has a value that W&B rejects.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return
    import wandb

    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except (wandb.Error, ValueError) as error:
        # A pydantic error lists the settings; W&B's own error is a sentence.
        details = [(str(e["loc"][0]), e["msg"]) for e in getattr(error, "errors", list)()]
        name, problem = details[0] if details else ("", first_line(error))
        variable = f"WANDB_{name.upper()}" if name else "A WANDB_ variable of the environment"
        value = os.environ.get(variable)
        shown = variable if value is None or "KEY" in variable else f"{variable}={quoted(value)}"
        raise UserError(
            f"{shown}: {printable(problem)}. Fix: correct or unset it; WANDB_MODE takes online, offline or disabled"
        ) from error


def _last_steps(run: Any) -> dict[str, float]:
    return {stage: run.summary[axis] for stage, axis in AXES.items() if axis in run.summary}


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
