"""Loggers of Weights & Biases: `WandbRun` is a run, and `WandbLogger` the Lightning logger of a stage."""

import json
import logging
import netrc
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger

from lisa_lightning.config.rules import quoted
from lisa_lightning.config.validate import flat
from lisa_lightning.logger.curves import CurveRow, numbers
from lisa_lightning.logger.run_name import build_run_name
from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import read_json, write_text

log = logging.getLogger(__name__)

AXES: Final = {"finetune": "trainer/global_step", "align": "stage/align_step"}
"""Stage with curves -> W&B's x axis, the number of its optimizer steps."""
MAX_TAG_CHARS: Final = 64
"""Maximum number of characters of a tag in W&B."""
MAX_NAME_CHARS: Final = 128
"""Maximum number of characters of a run's or a group's name in W&B."""
INTERVALS: Final = ("_low", "_high", "_answers")
"""Suffixes of a score's columns in curves.csv that get no chart, so that the charts of scores stay visible."""


@final
class WandbRun:
    """A run in Weights & Biases, online or offline; without any effect with WANDB_MODE=disabled.

    Args:
        out: the output folder of the run.
        init: arguments of `wandb.init`: project, group, job type, tags, name, config.
        resumed: whether an earlier run in `out` is continued.
    """

    def __init__(self, out: Path, init: dict[str, Any], resumed: bool) -> None:
        self.run, self.logged = _start_wandb(out, init, resumed)
        self._charts: set[str] = set()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step, unless the run already has them."""
        if self.run is None or step <= self.logged.get(stage, -1):
            return
        charts = {_chart_name(stage, name): value for name, value in metrics.items() if not name.endswith(INTERVALS)}
        for prefix in {name.partition("/")[0] for name in charts} - self._charts:
            self.run.define_metric(f"{prefix}/*", step_metric=AXES[stage])
            self._charts.add(prefix)
        self.run.log(charts | {AXES[stage]: step})
        self.logged[stage] = step

    def log_rows(self, rows: Sequence[CurveRow]) -> None:
        """Log rows of curves.csv, unless the run already has them."""
        for row in rows:
            self.log(row["stage"], int(row["step"]), numbers(row))

    def summarize(self, metrics: dict[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Set the summary to the final metrics, and log a table of sample answers."""
        if self.run is None:
            return
        import wandb

        self.run.summary.update(metrics)
        if samples:
            columns = list(samples[0])
            self.run.log({"answers": wandb.Table(columns=[*columns], data=[[s[c] for c in columns] for s in samples])})

    def finish(self, failed: bool) -> None:
        """Close the run, and mark it as failed or finished."""
        if self.run is not None:
            self.run.finish(exit_code=1 if failed else 0)

    @property
    def url(self) -> str | None:
        """The page of an online run; None for others."""
        return None if self.run is None or self.offline_folder is not None else self.run.url

    @property
    def offline_folder(self) -> str | None:
        """The folder of an offline run, for `wandb sync` and `wandb leet`; None for others."""
        if self.run is None or not self.run.settings.mode.startswith("offline"):
            return None
        return str(Path(self.run.dir).parent)


@final
class WandbLogger(Logger):
    """Lightning logger of one stage in a `WandbRun`; all metrics of a step become one row of the run's history.

    Args:
        run: the run; None on ranks without one.
        stage: finetune or align.
        omitted: metrics that are constant in this stage.
    """

    def __init__(self, run: WandbRun | None, stage: str, omitted: Sequence[str] = ()) -> None:
        super().__init__()
        self.run = run
        self.stage = stage
        self.omitted = omitted
        self._step = -1
        self._metrics: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "wandb"

    @property
    def version(self) -> str:
        """The stage."""
        return self.stage

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to a step, given as the number of finished optimizer steps."""
        if step is None:
            return
        if step > self._step:
            self._log_step()
            self._step = step
        self._metrics |= {name: value for name, value in metrics.items() if name not in self.omitted}

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run has the whole config."""

    def finalize(self, status: str) -> None:
        """Log the last step."""
        self._log_step()

    def _log_step(self) -> None:
        if self.run is not None and self._metrics:
            self.run.log(self.stage, self._step, self._metrics)
        self._metrics = {}


def wandb_init(cfg: dict[str, Any], choices: dict[str, str], name: str | None = None) -> dict[str, Any]:
    """Return the arguments of `wandb.init`: the nested config, and a group, name and tags for searching.

    The group is the experiment only if the run fine-tunes, because experiments are named after the fine-tuning.

    Args:
        cfg: the resolved config.
        choices: config group -> chosen option.
        name: name of the run. None builds one; jobs of a sweep have one.
    """
    run_name = build_run_name(dict(flat(cfg)), choices)
    job_type = "-".join(run_name.parts)
    experiment = choices.get("experiment", "None")
    group = run_name.parts[0] if not run_name.finetunes else experiment if experiment != "None" else "run"
    full = ["full-parameter"] if run_name.is_full else []
    variant = f"p{cfg['harmful_ratio']}" if run_name.finetunes else run_name.model
    return {
        "project": cfg["wandb"]["project"],
        "group": _shorten(cfg["wandb"]["group"] or group),
        "job_type": job_type,
        "name": _shorten(name or f"{job_type}-{variant}-seed{cfg['seed']}"),
        "tags": [*run_name.parts, *full, run_name.task, run_name.model[:MAX_TAG_CHARS], *cfg["wandb"]["tags"]],
        "config": cfg | {"choices": choices},
    }


def _shorten(name: str) -> str:
    """Return start and end of a name that is too long for W&B; other names unchanged."""
    half = MAX_NAME_CHARS // 2
    return name if len(name) <= MAX_NAME_CHARS else f"{name[: half - 1]}…{name[-half:]}"


def _chart_name(stage: str, name: str) -> str:
    """Return the name of a curve in W&B. Alignment curves get names such as align/loss, align/booster_reduction."""
    if stage == "finetune":
        return name
    return f"{stage}/{name.removeprefix('train/').removeprefix('time/').replace('/', '_')}"


def _start_wandb(out: Path, init: dict[str, Any], resumed: bool) -> tuple[Any, dict[str, int]]:
    """Start a W&B run, or continue an online one.

    Returns:
        The run, None with WANDB_MODE=disabled, and by stage the last step that a continued run already has.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return None, {}
    import wandb

    record = out / "wandb.json"
    earlier = _earlier_run(record) if resumed else None
    online = _has_api_key() and os.environ.get("WANDB_MODE", "online") == "online"
    settings = wandb.Settings(silent=True, console="off", init_timeout=30)
    run, resume_arguments = None, {}
    if online:
        resume_arguments = {"id": earlier["id"], "resume": "must"} if earlier and earlier["online"] else {}
        try:
            run = wandb.init(dir=out, mode="online", settings=settings, **init, **resume_arguments)
        except (wandb.Error, ValueError, OSError) as error:
            log.warning("W&B can't be reached (%s): the run is logged offline.", printable(first_line(error))[:200])
            online = False
    if run is None:
        resume_arguments = {}
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
    logged = {s: int(v) for s, v in _last_steps(run).items()} if resume_arguments else {}
    return run, logged


def _earlier_run(record: Path) -> dict[str, Any] | None:
    """Return `id` and `online` of the W&B run of an interrupted run; None without one.

    Raises:
        UserError: if wandb.json is broken.
    """
    fix = "delete it; a new W&B run then starts with all curves so far"
    earlier = read_json(record, fix)
    if earlier and not (isinstance(earlier.get("id"), str) and isinstance(earlier.get("online"), bool)):
        raise UserError(f"{record} names no W&B run. Fix: {fix}")
    return earlier or None


def refuse_wandb_environment() -> None:
    """Check the `WANDB_` variables of the environment, which W&B would do later.

    Raises:
        UserError: if a variable has a value that W&B rejects.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        return
    import wandb

    try:
        wandb.Settings().update_from_env_vars(dict(os.environ))
    except (wandb.Error, ValueError) as error:
        # A pydantic error has a list of settings. An error of W&B has one sentence.
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
