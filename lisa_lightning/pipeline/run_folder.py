"""The output folder of a run: refused if it holds another run, prepared, and filled with the report."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.config.validate import of_result, refuse_other_run
from lisa_lightning.evaluate.evaluator import read_answers
from lisa_lightning.evaluate.judging import read_judged
from lisa_lightning.evaluate.metrics import Metrics, verdict
from lisa_lightning.logger.curves import CurveRow
from lisa_lightning.logger.wandb import Tracker
from lisa_lightning.report.run_page import Told, page, samples
from lisa_lightning.report.terminal import terminal
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.run_files import (
    CHOICES,
    CONFIG,
    CURVES,
    FAILED,
    JUDGED,
    METRICS,
    RESPONSES,
    read_config,
    read_metrics,
    seal,
    unseal,
)
from lisa_lightning.task.base import Task

log = logging.getLogger(__name__)
MAY_CHANGE = ("stages", "judge", "responses")
"""Sections that a run and its resumption need not share."""


def refuse_used(out: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Raise UserError where the output folder holds another run, or this one and `resume` is not set."""
    used = any((out / name).exists() for name in ("checkpoints", CURVES, METRICS))
    if used and not resume:
        raise UserError(f"{out} holds a run; add resume=true to go on with it, or give another hydra.run.dir")
    if resume and not used:
        log.warning("Nothing to resume in %s: the run starts anew.", out)
    if used and (earlier := read_config(out)) is not None:
        refuse_other_run(*(of_result(c, MAY_CHANGE) for c in (earlier, config)))
    read_metrics(out)


def prepare_folder(out: Path, cfg: DictConfig, choices: dict[str, str]) -> None:
    """Make the output folder this run's: write down the config and what was chosen."""
    unseal(out)
    if (metrics := read_metrics(out)).pop("time/total_s", None) is not None:
        write_text(out / METRICS, json.dumps(metrics, indent=2))  # it is at its end no longer
    (out / FAILED).unlink(missing_ok=True)  # what an earlier try failed by
    write_text(out / CONFIG, OmegaConf.to_yaml(cfg, resolve=True))
    write_text(out / CHOICES, json.dumps(choices, indent=2))
    if not (out / "overrides.yaml").exists():  # Hydra's own list is that of the last command, even of a refused one
        write_text(out / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))
    log.info("Output goes to %s", out)  # a run that is killed has no last line that says so


def write_report(
    config: Mapping[str, Any], out: Path, tracker: Tracker, metrics: Metrics, choices: dict[str, str], task: Task
) -> None:
    """Everything that a person looks at: metrics.json, report.html, the W&B summary, the table in the terminal."""
    shown = write_page(config, out, metrics, tracker.curves.rows(), choices, task)
    tracker.summarize(metrics, [asdict(told.answer) | {"verdict": told.verdict} for told in shown])
    write_text(out / METRICS, json.dumps(metrics, indent=2))  # last but the seal: it says that the run is at its end
    seal(out)
    terminal(out, metrics, tracker.offline_folder, tracker.url)


def write_page(
    config: Mapping[str, Any],
    out: Path,
    metrics: Metrics,
    curves: list[CurveRow],
    choices: dict[str, str],
    task: Task,
) -> list[Told]:
    """Write report.html; the sample answers that it shows."""
    conclusive = [j for j in read_judged(out / JUDGED) if j.kind != "harmless" or j.refused is not None]
    judged = {(j.model, j.kind, j.index): j for j in reversed(conclusive)}  # of the first judge that can tell
    answers = [Told(a, verdict(task, a, judged.get((a.model, a.kind, a.index)))) for a in read_answers(out / RESPONSES)]
    page(out, metrics, curves, answers, choices, config)
    return samples(answers)
