"""The output folder of a run: `prepare_folder` and `write_report`."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lisa_lightning.config.same_run import refuse_other_run, result_settings
from lisa_lightning.config.validate import plain
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.judging import Judged
from lisa_lightning.evaluation.metrics import verdict_word
from lisa_lightning.evaluation.scores import Metrics, Score
from lisa_lightning.logger.curves import CurveRow
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.pipeline.request import Request
from lisa_lightning.report.model_card import write_card
from lisa_lightning.report.run_page import JudgedAnswer, sample_answers, write_run_page
from lisa_lightning.report.terminal import print_summary
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import write_text
from lisa_lightning.runtime.run_files import (
    CHOICES,
    CONFIG,
    CURVES,
    FAILED,
    METRICS,
    read_config,
    read_metrics,
    seal,
    unseal,
)
from lisa_lightning.task.base import Task

log = logging.getLogger(__name__)
OVERRIDES = "overrides.yaml"


@dataclass(frozen=True)
class Results:
    """Results of a run or of a judging, which the report shows."""

    metrics: Metrics
    """Content of metrics.json."""
    scores: list[Score]
    answers: list[Answer]
    judged: list[Judged]


def refuse_used(out: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Check that a folder has no other run.

    Args:
        out: output folder.
        config: config of the run, resolved.
        resume: config key `resume`.

    Raises:
        UserError: if the folder holds another run, or this run and `resume` is false.
    """
    used = any((out / name).exists() for name in ("checkpoints", CURVES, METRICS))
    if used and not resume:
        raise UserError(f"{out} holds a run; add resume=true to go on with it, or give another hydra.run.dir")
    if resume and not used:
        log.warning("Nothing to resume in %s: the run starts anew.", out)
    if used and (earlier := read_config(out)) is not None:
        refuse_other_run(*(result_settings(c, resumable=True) for c in (earlier, config)))
    read_metrics(out)


def prepare_folder(request: Request) -> None:
    """Write config, choices and overrides into the output folder, and mark the run as unfinished."""
    out = request.out
    unseal(out)
    if (metrics := read_metrics(out)).pop("time/total_s", None) is not None:
        write_text(out / METRICS, json.dumps(metrics, indent=2))
    (out / FAILED).unlink(missing_ok=True)
    write_text(out / CONFIG, OmegaConf.to_yaml(request.cfg, resolve=True))
    write_text(out / CHOICES, json.dumps(dict(request.choices), indent=2))
    # Hydra's own list is overwritten by every command, even a rejected one.
    if not (out / OVERRIDES).exists():
        write_text(out / OVERRIDES, OmegaConf.to_yaml(list(request.overrides)))
    # A run that is killed does not reach the summary, which names the folder too.
    log.info("Output goes to %s", out)


def write_report(request: Request, loggers: RunLoggers, results: Results, task: Task) -> None:
    """Write report.html, the model card, the W&B summary and metrics.json, and print a table of the scores."""
    out, metrics = request.out, results.metrics
    samples = write_page(plain(request.cfg), out, results, loggers.curves.rows(), dict(request.choices), task)
    loggers.wandb.summarize(metrics, [asdict(sample.answer) | {"verdict": sample.verdict} for sample in samples])
    write_card(out, metrics)
    # Complete metrics mark the run as finished, so only the seal is written later.
    write_text(out / METRICS, json.dumps(metrics, indent=2))
    seal(out)
    print_summary(out, metrics, results.scores, loggers.wandb.offline_folder, loggers.wandb.url)


def write_page(
    config: Mapping[str, Any],
    out: Path,
    results: Results,
    curves: list[CurveRow],
    choices: dict[str, str],
    task: Task,
) -> list[JudgedAnswer]:
    """Write report.html; return the sample answers that it shows."""
    verdicts: dict[tuple[str, str, int], list[Judged]] = {}
    for line in results.judged:
        verdicts.setdefault((line.model, line.kind, line.index), []).append(line)
    answers = [
        JudgedAnswer(a, verdict_word(task, a, verdicts.get((a.model, a.kind, a.index), []))) for a in results.answers
    ]
    write_run_page(out, results.metrics, results.scores, curves, answers, choices, config)
    return sample_answers(answers)
