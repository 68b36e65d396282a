"""What a multirun does beside its jobs: a folder that the same command finds again, failures that end one job alone."""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.config.arguments import override_indices
from lisa_lightning.config.explain import explain
from lisa_lightning.config.instances import load_class
from lisa_lightning.config.validate import bookkeeping, check, of_result, plain
from lisa_lightning.report.sweep_files import leave
from lisa_lightning.runtime.cache import code_digest
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import Held, drop_unused, write_text
from lisa_lightning.runtime.run_files import CONFIG, FAILED, complete, read_config, read_metrics, refuse_changed

log = logging.getLogger(__name__)

FOLDER = "hydra.sweep.dir"
JOB_FOLDER = "hydra.sweep.subdir"
OF_ONE_RUN = ("WANDB_RUN_ID", "WANDB_RESUME")
"""Variables of the environment that name one W&B run, which no two jobs may share."""
SHOWING = {"--help", "-h", "--cfg", "-c", "--info"}
"""Hydra's flags of a command that runs nothing."""
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
"""Hydra's own sweeper, which runs through values and looks for nothing."""
LONGEST = 120  # bytes of a sweep's folder
LONGEST_JOB = 200  # of a job's, which says every value; file systems take 255 bytes


def placed(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """A command's arguments and the folder of its sweep, None where it isn't one.

    The folder is named after what was asked for, and a job's after its own values, so that the same command finds its
    finished jobs, and a longer one finds those that it shares.
    """
    if not {"-m", "--multirun"} & set(arguments) or SHOWING & set(arguments):
        return list(arguments), None
    lines = [arguments[index] for index in override_indices(arguments)]
    try:
        overrides = OverridesParser.create().parse_overrides(lines)
    except Exception:  # Hydra says it better
        return list(arguments), None
    given = {str(o.key_or_group): o for o in overrides}
    if JOB_FOLDER in given:
        _refuse_outside(str(given[JOB_FOLDER].value()))
    own = [o for o in overrides if not bookkeeping(str(o.key_or_group))]
    swept = sorted(str(o.key_or_group) for o in own if o.is_sweep_override())
    fixed = {str(o.key_or_group): str(o.input_line) for o in own if not o.is_sweep_override()}
    if FOLDER in given:  # which may hold other sweeps: a job's name says all that was asked for
        folder = Path(str(given[FOLDER].value()))
        if "${" in str(folder):
            raise UserError(f"{FOLDER}={folder} must be written out: a sweep's folder is needed before its config is")
        named = [key for key in ("experiment", "sweep") if key not in swept]
        known = [key for key in given if key not in {*swept, *fixed}] + named
        told = bool({*swept, *fixed} - {*named})
    else:
        named = {key: str(given[key].value()) for key in ("experiment", "sweep") if key in fixed}
        rest = [line for key, line in sorted(fixed.items()) if key not in named]
        name = ",".join([*([named["sweep"]] if "sweep" in named else []), *swept, *rest])
        folder = Path("multirun", *filter(None, (named.get("experiment"), _name(name) or "one")))
        known = [key for key in given if key not in swept]
        told = bool(swept)
    more = {FOLDER: f"'{folder}'", "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(known)}]"}
    if not told and "sweep" not in fixed:
        more["hydra.sweep.subdir"] = "job"
    return [*arguments, *(f"{key}={value}" for key, value in more.items() if key not in given)], folder


def _refuse_outside(subdir: str) -> None:
    """Raise UserError where a job's folder would not be in its sweep's."""
    if ".." in Path(subdir).parts or Path(subdir).is_absolute():
        raise UserError(
            f"{JOB_FOLDER}={subdir} lies outside the sweep's folder. Fix: name a relative path without `..`"
        )


def drop_run_variables() -> None:
    """Remove variables that would give every job of a sweep the same W&B run, with a warning."""
    for name in OF_ONE_RUN:
        if os.environ.pop(name, None) is not None:
            print(f"{name} is ignored in a sweep: each job is a W&B run of its own.", file=sys.stderr)


def _name(name: str) -> str:
    return _short(re.sub(r"[^\w.,=+-]+", "_", name), LONGEST)


def _short(name: str, longest: int) -> str:
    whole = name.encode()
    if len(whole) <= longest:
        return name
    return f"{whole[:longest].decode(errors='ignore')}-{sha256(whole).hexdigest()[:8]}"


def _job_name(name: str) -> str:
    return "/".join(_short(part, LONGEST_JOB) for part in name.split("/"))


OmegaConf.register_new_resolver("job_name", _job_name, replace=True)  # conf/config.yaml names the jobs' folders by it


def job(cfg: DictConfig) -> float | None:
    """Run one job of a sweep, or find it finished; a failure is noted in its folder and ends it alone.

    Returns:
        Accuracy minus harmful score, for sweepers that look for the best; None where it failed or lacks one of them.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    if not out.resolve().is_relative_to(_folder()):
        # A config of one's own may say so; a command is refused before Hydra makes the folder.
        drop_unused(out)
        _refuse_outside(str(out))
    try:
        metrics = _run(out, cfg)
    except Held:
        log.info("%s is being run by another process.", out.name)
        return None
    except Exception as error:
        sentence = explain(error) or printable(f"{type(error).__name__}: {error}")
        write_text(out / FAILED, json.dumps({"cause": sentence, "traceback": traceback.format_exc()}, indent=1))
        log.error("%s failed: %s", out.name, sentence)
        return None
    (out / FAILED).unlink(missing_ok=True)
    return value(metrics)


def _run(out: Path, cfg: DictConfig) -> Mapping[str, Any]:
    """Return the metrics of a job, from its folder if it is finished.

    Raises:
        UserError: if its config is wrong, or its folder is damaged.
    """
    check(cfg)
    cfg.wandb.group = cfg.wandb.group or _folder().name
    cfg.resume = (out / CONFIG).exists()
    if (metrics := _finished(out, cfg)) is not None:
        return metrics
    if list(cfg.stages) == ["judge"]:
        raise UserError("stages=[judge] is no job of a sweep; judge=[ONE,OTHER] asks several judges at once")
    _refuse_without_value(cfg)
    from lisa_lightning.pipeline.run import run

    return run(cfg, out.resolve().relative_to(_folder()).as_posix())


def value(metrics: Mapping[str, Any]) -> float | None:
    """Accuracy minus harmful score. A missing one is not 0: the best would then be what the other alone says."""
    accuracy, harmful = (metrics.get(f"final/{name}") for name in ("accuracy", "harmful_score"))
    return None if accuracy is None or harmful is None else accuracy - harmful


def _refuse_without_value(cfg: DictConfig) -> None:
    """Raises UserError where a sweeper looks for the best and this job would have no value for it."""
    if HydraConfig.get().sweeper._target_ == BASIC:
        return
    from lisa_lightning.task.base import Scored

    judges = {name: load_class(own._target_, f"judge.{name}") for name, own in cfg.judge.items()}
    harm = any(judge.metric == "harmful_score" for judge in judges.values())
    right = isinstance(load_class(cfg.task._target_, "task")(), Scored)
    if harm and right and {"finetune", "evaluate", "judge"} <= {*cfg.stages}:
        return
    asked = f"judge=[{','.join(map(str, cfg.judge))}], task={HydraConfig.get().runtime.choices['task']}"
    raise UserError(
        f"{asked} and stages=[{','.join(cfg.stages)}] give no accuracy minus harmful score, which this sweeper "
        "looks for: that takes a judge beyond refusal and win_rate, a task that isn't alpaca, and the stages finetune, "
        "evaluate and judge"
    )


def _finished(out: Path, cfg: DictConfig) -> Mapping[str, Any] | None:
    """Return the metrics of a job that needs no running, None for others."""
    metrics = read_metrics(out)
    if not complete(metrics) or (config := read_config(out)) is None:
        return None
    refuse_changed(out)
    if of_result(config) != of_result(plain(cfg)):
        return None
    if metrics.get("code") != code_digest():
        log.warning("%s was run by another version of the code; delete the folder to run it anew.", out)
    log.info("%s is finished.", out.name)
    return metrics


def multirun() -> bool:
    """Whether this process runs a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _folder() -> Path:
    return Path(HydraConfig.get().sweep.dir).resolve()


def failed(folder: Path, since: float) -> bool:
    """Whether a job of the sweep noted a failure since then, in seconds of the epoch."""
    return any(note.stat().st_mtime >= since for note in folder.rglob(FAILED))


def finish(folder: Path, since: float) -> int:
    """Write the sweep's table and page, say what failed; the exit status of a command that began then."""
    leave([folder], folder)
    return int(failed(folder, since))
