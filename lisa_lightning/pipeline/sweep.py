"""Sweeps (`-m`): `resolve_sweep_dir` names the folder, `run_job` runs a job, `finalize_sweep` writes table and page."""

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
from tqdm.contrib.logging import logging_redirect_tqdm

from lisa_lightning.config.arguments import override_indices
from lisa_lightning.config.explain import explain
from lisa_lightning.config.same_run import is_bookkeeping, result_settings
from lisa_lightning.config.validate import check, plain
from lisa_lightning.pipeline.request import Request
from lisa_lightning.pipeline.search import FIXED_UNDER_ATTACK, SearchJob, is_search, search_value
from lisa_lightning.report.search_trials import Objective
from lisa_lightning.report.sweep_files import write_sweep
from lisa_lightning.runtime.cache import package_hash
from lisa_lightning.runtime.errors import UserError, printable
from lisa_lightning.runtime.files import FolderLockedError, drop_unused, write_text
from lisa_lightning.runtime.logs import silence_libraries
from lisa_lightning.runtime.run_files import CONFIG, FAILED, is_complete, read_config, read_metrics, refuse_changed

log = logging.getLogger(__name__)

FOLDER = "hydra.sweep.dir"
JOB_FOLDER = "hydra.sweep.subdir"
RUN_VARIABLES = ("WANDB_RUN_ID", "WANDB_RESUME")
"""Environment variables that name one W&B run, which jobs must not share."""
INFO_FLAGS = {"--help", "-h", "--cfg", "-c", "--info"}
"""Hydra's flags of commands that run nothing."""
ATTACKERS = ("attack", "attack_full")
"""Values of config group `sweep` that search for an attacker's worst case."""
MAX_FOLDER_BYTES = 120
"""Maximum length of the name of a sweep's folder."""
MAX_JOB_BYTES = 200
"""Maximum length of the name of a job's folder, which has every value. File systems allow 255 bytes."""


def resolve_sweep_dir(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Return a command's arguments with the folders of its sweep and its jobs.

    A sweep's folder is named after its overrides, and a job's folder after its values. So the same command finds its
    finished jobs, and a longer one finds those that it shares.

    Args:
        arguments: arguments of the command.

    Returns:
        The arguments, and the folder of the sweep. The folder is None if the command is no sweep.

    Raises:
        UserError: if a job's folder is outside of the sweep's, `hydra.sweep.dir` is an interpolation, or an attacker's
            search would vary a defense or an adapter that it does not have.
    """
    if not {"-m", "--multirun"} & set(arguments) or INFO_FLAGS & set(arguments):
        return list(arguments), None
    lines = [arguments[index] for index in override_indices(arguments)]
    try:
        overrides = OverridesParser.create().parse_overrides(lines)
    except Exception:
        # Hydra reports the error.
        return list(arguments), None
    by_key = {str(o.key_or_group): o for o in overrides}
    if JOB_FOLDER in by_key:
        _refuse_outside(str(by_key[JOB_FOLDER].value()))
    # Another objective is another search.
    with_result = [o for o in overrides if not is_bookkeeping(key := str(o.key_or_group)) or key.startswith("sweep.")]
    swept = sorted(str(o.key_or_group) for o in with_result if o.is_sweep_override())
    if "sweep" in by_key and by_key["sweep"].value() in ATTACKERS:
        _refuse_searched_defense(swept)
        if by_key["sweep"].value() == "attack" and "lora" in by_key and by_key["lora"].value() is None:
            raise UserError(
                "sweep=attack lora=null: the search varies lora.r, which lora=null does not have. "
                "Fix: sweep=attack_full, and leave lora=null out"
            )
    fixed = {str(o.key_or_group): str(o.input_line) for o in with_result if not o.is_sweep_override()}
    if FOLDER in by_key:
        # The folder may hold other sweeps, so a job's name has all overrides.
        folder = Path(str(by_key[FOLDER].value()))
        if "${" in str(folder):
            raise UserError(f"{FOLDER}={folder} must be written out: a sweep's folder is needed before its config is")
        objective = [key for key in by_key if key.startswith("sweep.")]
        named = [key for key in ("experiment", "sweep", *objective) if key not in swept]
        excluded = [key for key in by_key if key not in {*swept, *fixed}] + named
        job_has_name = bool({*swept, *fixed} - {*named})
    else:
        groups = {key: str(by_key[key].value()) for key in ("experiment", "sweep") if key in fixed}
        fixed_lines = [line for key, line in sorted(fixed.items()) if key not in groups]
        name = ",".join([*([groups["sweep"]] if "sweep" in groups else []), *swept, *fixed_lines])
        folder = Path("multirun", *filter(None, (groups.get("experiment"), _folder_name(name) or "one")))
        excluded = [key for key in by_key if key not in swept]
        job_has_name = bool(swept)
    settings = {FOLDER: f"'{folder}'", "hydra.job.config.override_dirname.exclude_keys": f"[{','.join(excluded)}]"}
    if not job_has_name and "sweep" not in fixed:
        settings["hydra.sweep.subdir"] = "job"
    return [*arguments, *(f"{key}={value}" for key, value in settings.items() if key not in by_key)], folder


def _refuse_outside(subdir: str) -> None:
    """Raise UserError if the folder of a job would be outside of its sweep's folder."""
    if ".." in Path(subdir).parts or Path(subdir).is_absolute():
        raise UserError(
            f"{JOB_FOLDER}={subdir} lies outside the sweep's folder. Fix: name a relative path without `..`"
        )


def _refuse_searched_defense(swept: Sequence[str]) -> None:
    """Raise UserError if an attacker's search would vary a defense or the seed."""
    if varied := [key for key in swept if key in FIXED_UNDER_ATTACK]:
        raise UserError(
            f"sweep=attack with several values of {varied[0]}: the trials of one search would be shared among them. "
            f"Fix: one command for each {varied[0]}, then `python -m lisa_lightning.report FOLDER FOLDER --out OUT`"
        )


def drop_run_variables() -> None:
    """Remove variables that would give every job of a sweep the same W&B run, with a warning."""
    for name in RUN_VARIABLES:
        if os.environ.pop(name, None) is not None:
            print(f"{name} is ignored in a sweep: each job is a W&B run of its own.", file=sys.stderr)


def _folder_name(name: str) -> str:
    return _shorten(re.sub(r"[^\w.,=+-]+", "_", name), MAX_FOLDER_BYTES)


def _shorten(name: str, max_bytes: int) -> str:
    """Return a name of at most about `max_bytes` bytes; a hash replaces the end of a longer one."""
    encoded = name.encode()
    if len(encoded) <= max_bytes:
        return name
    return f"{encoded[:max_bytes].decode(errors='ignore')}-{sha256(encoded).hexdigest()[:8]}"


def _job_name(name: str) -> str:
    return "/".join(_shorten(part, MAX_JOB_BYTES) for part in name.split("/"))


# hydra.sweep.subdir in conf/config.yaml uses it.
OmegaConf.register_new_resolver("job_name", _job_name, replace=True)


def run_job(cfg: DictConfig) -> float | None:
    """Run one job of a sweep, unless it is finished. An error is recorded in its folder and ends only this job.

    Returns:
        The objective of a search (`search_value`). None if the job failed or lacks a score, or the sweep is no search.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    if not out.resolve().is_relative_to(_sweep_folder()):
        # In a command this is rejected before Hydra creates the folder, but not in a user's config.
        drop_unused(out)
        _refuse_outside(str(out))
    try:
        value = _run_search_job(out, cfg) if is_search() else _run_job(out, cfg)
    except FolderLockedError:
        log.info("%s is being run by another process.", out.name)
        return None
    except Exception as error:
        sentence = explain(error) or printable(f"{type(error).__name__}: {error}")
        write_text(out / FAILED, json.dumps({"cause": sentence, "traceback": traceback.format_exc()}, indent=1))
        log.error("%s failed: %s", out.name, sentence)
        return None
    (out / FAILED).unlink(missing_ok=True)
    return value


def _run_job(out: Path, cfg: DictConfig) -> None:
    check(cfg)
    _run(_job_request(out, cfg))


def _run_search_job(out: Path, cfg: DictConfig) -> float | None:
    """Run a trial of a search, record it, and return its value. A failure is recorded too."""
    check(cfg)
    job = SearchJob(cfg, _sweep_folder())
    objective = Objective(cfg.sweep.value)
    try:
        objective = job.prepare(cfg, _run)
        value = search_value(objective, _run(_job_request(out, cfg)), out)
    except FolderLockedError:
        raise
    except Exception:
        # An interrupted trial is repeated, and has no record until then.
        job.record(out, objective, None)
        raise
    job.record(out, objective, value)
    return value


def _job_request(out: Path, cfg: DictConfig) -> Request:
    job = out.resolve().relative_to(_sweep_folder()).as_posix()
    return Request.from_hydra(cfg, HydraConfig.get(), out, job)


def _run(request: Request) -> Mapping[str, Any]:
    """Return the metrics of a request within a sweep, from its folder if it is finished.

    Raises:
        UserError: if its config is wrong, or its folder is damaged.
    """
    cfg, out = request.cfg, request.out
    check(cfg)
    cfg.wandb.group = cfg.wandb.group or _sweep_folder().name
    cfg.resume = (out / CONFIG).exists()
    if (metrics := _finished_metrics(out, cfg)) is not None:
        return metrics
    if list(cfg.stages) == ["judge"]:
        raise UserError("stages=[judge] is no job of a sweep; judge=[ONE,OTHER] asks several judges at once")
    from lisa_lightning.pipeline.run import run

    silence_libraries()
    with logging_redirect_tqdm():
        return run(request)


def _finished_metrics(out: Path, cfg: DictConfig) -> Mapping[str, Any] | None:
    """Return the metrics of a finished job with this config, None for other jobs."""
    metrics = read_metrics(out)
    if not is_complete(metrics) or (config := read_config(out)) is None:
        return None
    refuse_changed(out)
    if result_settings(config) != result_settings(plain(cfg)):
        return None
    if metrics.get("code") != package_hash():
        log.warning("%s was run by another version of the code; delete the folder to run it anew.", out)
    log.info("%s is finished.", out.name)
    return metrics


def is_multirun() -> bool:
    """Return whether this process runs a job of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def _sweep_folder() -> Path:
    return Path(HydraConfig.get().sweep.dir).resolve()


def has_failed(folder: Path, since: float) -> bool:
    """Return whether a job of the sweep has failed since a time, in seconds of the epoch."""
    return any(record.stat().st_mtime >= since for record in folder.rglob(FAILED))


def finalize_sweep(folder: Path, since: float) -> int:
    """Write table and page of the sweep, and return the exit status of the command.

    Args:
        folder: folder of the sweep.
        since: start of the command, in seconds of the epoch.
    """
    write_sweep([folder], folder)
    return int(has_failed(folder, since))
