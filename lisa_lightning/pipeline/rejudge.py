"""Judge stored answers: those of a run folder, or a file of the user's; nothing is generated."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from omegaconf import DictConfig

from lisa_lightning import task as tasks
from lisa_lightning.config.instances import load_class
from lisa_lightning.evaluate.coverage import refuse_unscored
from lisa_lightning.evaluate.evaluator import read_answers
from lisa_lightning.evaluate.judging import read_responses, refuse_no_reference
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.judge.base import Judge
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.pipeline.run_folder import write_page
from lisa_lightning.pipeline.stages.judge import judge
from lisa_lightning.report.terminal import terminal
from lisa_lightning.runtime.cache import cache_folder
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.run_files import (
    CONFIG,
    CURVES,
    METRICS,
    RESPONSES,
    complete,
    read_choices,
    read_config,
    read_metrics,
    refuse_changed,
    seal,
    unseal,
)
from lisa_lightning.task.base import Scored, Task

log = logging.getLogger(__name__)
Judges = Mapping[str, Judge]


def rejudge(cfg: DictConfig, out: Path, judges: Judges) -> Metrics:
    """Judge a file of answers, or again those of the run that the output folder holds; nothing is generated.

    The folder may come from another person, so its files are data. Of the classes that its config names only this
    project's tasks, or the command's own, are used.
    """
    if cfg.responses is not None and (out / CONFIG).exists():
        raise UserError(
            f"{out} holds a run, whose verdicts would be lost; give another hydra.run.dir for {cfg.responses}"
        )
    config = read_config(out)
    refuse_changed(out)
    if cfg.responses is not None:
        answers = read_responses(cfg.responses)
        refuse_no_reference(judges, answers, cfg.responses)
    else:
        answers = read_answers(out / RESPONSES)
    if not answers:
        raise UserError(
            f"{out} holds no answers to judge; name a run's folder as hydra.run.dir=FOLDER, or a file as responses=FILE"
        )
    metrics = read_metrics(out) if cfg.responses is None else {}
    if cfg.responses is None and not complete(metrics):
        log.warning("The run in %s is not finished: answers may be missing, the longest prompts' first.", out)
    choices, curves = read_choices(out), read_rows(out / CURVES)
    task = None if config is None or not choices else _task_of(config, cfg, out)
    source = f"responses={cfg.responses}" if cfg.responses is not None else str(out / RESPONSES)
    refuse_unscored(judges, answers, source, isinstance(task, Scored))
    unseal(out)
    metrics |= judge(judges, answers, out, cache_folder(cfg.cache_dir))
    write_text(out / METRICS, json.dumps(metrics, indent=2))
    if task is not None:
        assert config is not None
        write_page(config, out, metrics, curves, choices, task)
    seal(out)
    terminal(out, metrics, None, None)
    return metrics


def _task_of(config: Mapping[str, Any], cfg: DictConfig, out: Path) -> Task:
    """Return the task of a run that a folder holds.

    Raises:
        UserError: if it is neither a task of this project nor the command's own: its code would be run.
    """
    section = config.get("task")
    target = section.get("_target_") if isinstance(section, dict) else None
    ours = {module.name for module in iter_modules(tasks.__path__, f"{tasks.__name__}.")}
    if target == cfg.task._target_ or (isinstance(target, str) and target.rpartition(".")[0] in ours):
        return load_class(target, "task")()
    raise UserError(
        f"{out / CONFIG} names the task class {target}, which is none of this project's, so it is not run. Fix: if you "
        "trust it, choose the same task in the command, task=NAME"
    )
