"""Judging of stored answers, in a run folder or in a user's file: `rejudge`. Nothing is generated."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from omegaconf import DictConfig

from lisa_lightning import task as tasks
from lisa_lightning.config.instances import load_class
from lisa_lightning.evaluation.agreement import PREFIX as AGREEMENT
from lisa_lightning.evaluation.coverage import refuse_unscored
from lisa_lightning.evaluation.evaluator import Answer, read_answers
from lisa_lightning.evaluation.judging import read_responses, refuse_no_reference
from lisa_lightning.evaluation.scores import Metrics, read_scores, score_metrics
from lisa_lightning.judge.base import Judge
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.pipeline.request import Request
from lisa_lightning.pipeline.run_folder import Results, write_page
from lisa_lightning.pipeline.stages.judge import judge
from lisa_lightning.report.model_card import write_card
from lisa_lightning.report.terminal import print_summary
from lisa_lightning.runtime.cache import cache_folder
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.run_files import (
    CONFIG,
    CURVES,
    METRICS,
    RESPONSES,
    is_complete,
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


def rejudge(request: Request, judges: Judges) -> Metrics:
    """Judge a file of answers, or the answers of the run in the output folder, and return the metrics.

    The folder may come from another person, so its files are treated as data. Of the classes that its config names,
    only tasks of this package and of the request are used.

    Args:
        request: the request. Its folder receives verdicts, metrics and, for a run's answers, the page.
        judges: judges by name.

    Raises:
        UserError: if there are no answers; no judge scores them; a file of the folder is damaged; `responses` is set
            and the folder holds a run.
    """
    cfg, out = request.cfg, request.out
    if cfg.responses is not None and (out / CONFIG).exists():
        raise UserError(
            f"{out} holds a run, whose verdicts would be lost; give another hydra.run.dir for {cfg.responses}"
        )
    config = read_config(out)
    refuse_changed(out)
    answers = _answers(cfg, out, judges)
    metrics = read_metrics(out) if cfg.responses is None else {}
    if cfg.responses is None and not is_complete(metrics):
        log.warning("The run in %s is not finished: answers may be missing, the longest prompts' first.", out)
    choices, curves = read_choices(out), read_rows(out / CURVES)
    task = None if config is None or not choices else _load_task(config, cfg, out)
    source = f"responses={cfg.responses}" if cfg.responses is not None else str(out / RESPONSES)
    refuse_unscored(judges, answers, source, isinstance(task, Scored))
    unseal(out)
    judgment = judge(judges, answers, out, cache_folder(cfg.cache_dir))
    metrics = {name: value for name, value in metrics.items() if not name.startswith(f"{AGREEMENT}/")}
    metrics |= score_metrics(judgment.scores) | judgment.metrics
    write_text(out / METRICS, json.dumps(metrics, indent=2))
    scores = read_scores(metrics)
    if task is not None:
        assert config is not None
        write_page(config, out, Results(metrics, scores, answers, judgment.judged), curves, choices, task)
        write_card(out, metrics)
    seal(out)
    print_summary(out, metrics, scores, None, None)
    return metrics


def _answers(cfg: DictConfig, out: Path, judges: Judges) -> list[Answer]:
    """Return the answers to judge. Raise UserError if there are none, or one lacks a reference that a judge needs."""
    if cfg.responses is not None:
        answers = read_responses(cfg.responses)
        refuse_no_reference(judges, answers, cfg.responses)
    else:
        answers = read_answers(out / RESPONSES)
    if not answers:
        raise UserError(
            f"{out} holds no answers to judge; name a run's folder as hydra.run.dir=FOLDER, or a file as responses=FILE"
        )
    return answers


def _load_task(config: Mapping[str, Any], cfg: DictConfig, out: Path) -> Task:
    """Return the task of the run that a folder holds.

    Raises:
        UserError: if it is neither a task of this package nor that of the request, because its code would be run.
    """
    section = config.get("task")
    target = section.get("_target_") if isinstance(section, dict) else None
    known_modules = {module.name for module in iter_modules(tasks.__path__, f"{tasks.__name__}.")}
    if target == cfg.task._target_ or (isinstance(target, str) and target.rpartition(".")[0] in known_modules):
        return load_class(target, "task")()
    raise UserError(
        f"{out / CONFIG} names the task class {target}, which is none of this project's, so it is not run. Fix: if you "
        "trust it, choose the same task in the command, task=NAME"
    )
