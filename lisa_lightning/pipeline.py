"""A run from its config to its output folder: refuse, run the stages, judge, leave what a person looks at."""

import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from pkgutil import iter_modules
from time import perf_counter
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from lisa_lightning import task as tasks
from lisa_lightning.base_model import base_model
from lisa_lightning.cache import cache_folder, digest, own_code
from lisa_lightning.config import flat, of_result, plain, refuse_other_run
from lisa_lightning.cpu import keep_freed_memory
from lisa_lightning.curate.curate import Curate
from lisa_lightning.curves import CurveRow, read_rows
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.source import contents, load_rows
from lisa_lightning.disk import explained, owned, write_text
from lisa_lightning.errors import UserError
from lisa_lightning.evaluate.coverage import refuse_unscored
from lisa_lightning.evaluate.evaluator import Answer, read_answers
from lisa_lightning.evaluate.judging import read_judged, read_responses, refuse_no_reference
from lisa_lightning.evaluate.scores import Metrics, verdict
from lisa_lightning.instances import load_class, refuse_unknown_arguments
from lisa_lightning.judge.judge import Judge
from lisa_lightning.method.method import Method
from lisa_lightning.needs import Defense, defending, refuse_unmet
from lisa_lightning.net import name_base, refuse_quantization
from lisa_lightning.preflight import Fit, preflight
from lisa_lightning.processes import fabric_of, first_rank, launched, refuse_processes
from lisa_lightning.repair.repair import Repair
from lisa_lightning.report.page import Told, page, samples
from lisa_lightning.report.terminal import terminal
from lisa_lightning.run_folder import (
    CHOICES,
    CONFIG,
    CURVES,
    FAILED,
    JUDGED,
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
from lisa_lightning.stages.align import align
from lisa_lightning.stages.curate import curate
from lisa_lightning.stages.evaluate import evaluate
from lisa_lightning.stages.finetune import finetune
from lisa_lightning.stages.judge import judge
from lisa_lightning.stages.reference import pairs
from lisa_lightning.stages.repair import repair
from lisa_lightning.stages.setting import Setting
from lisa_lightning.task.task import Scored, Task
from lisa_lightning.tracking import Tracker, refuse_wandb_environment, wandb_init

log = logging.getLogger(__name__)
Judges = Mapping[str, Judge]
MAY_CHANGE = ("stages", "judge", "responses")
"""Sections that a run and its resumption need not share."""


def run(cfg: DictConfig, job: str | None = None) -> Metrics:
    """Run the stages of `cfg` into Hydra's output folder and return what metrics.json holds.

    Args:
        job: its folder within its sweep, if it is a job of one.

    Raises:
        UserError: what the user can put right; see the modules that each stage calls.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    first = first_rank()
    with owned(out) if first else nullcontext(), logging_redirect_tqdm():
        return _run(cfg, out, first, job)


def _run(cfg: DictConfig, out: Path, first: bool, job: str | None) -> Metrics:
    started = perf_counter()
    _hush()
    config = plain(cfg)
    refuse_unknown_arguments(config)
    judges: Judges = {name: instantiate(own) for name, own in cfg.judge.items()} if "judge" in cfg.stages else {}
    if list(cfg.stages) == ["judge"]:
        return _judge_stored(cfg, out, judges)
    refuse_wandb_environment()
    fabric = fabric_of(cfg.trainer)
    if job is not None:
        refuse_processes(fabric, cfg.trainer)
    task = load_class(cfg.task._target_, "task")()
    choices = {
        name: str(choice) for name, choice in HydraConfig.get().runtime.choices.items() if not name.startswith("hydra/")
    }
    defenses = _defenses(cfg)
    refuse_unmet(defenses.there, choices, cfg, fabric.world_size)
    defender = any("defender rows" in defense.needs for defense in defenses.there.values())
    rows = load_rows(cfg.source, task, cfg.data.allow_overlap, defender)
    if defenses.repair and "reference" in cfg.repair:
        pairs(rows)  # none is refused at once, not when the model is trained
    user = []
    if defenses.method:
        user = user_rows(rows, cfg.data.n, cfg.harmful_ratio, cfg.data.order, cfg.seed, defenses.method.safe_ratio)
    if cfg.model.quantize is not None:
        refuse_quantization()
    keep_freed_memory()
    if first:  # before a model is fetched
        _refuse_used(out, config, cfg.resume)
    # Closing the W&B run may take a while: it waits until the ranks no longer watch one another.
    with ExitStack() as closing, launched(fabric, cfg.trainer.timeout_min) as ranks:
        out = Path(fabric.broadcast(str(out)))
        base, base_key = base_model(ranks, cfg.model, cache_folder(cfg.cache_dir))
        preflight(base, cfg, Fit(defenses.align, defenses.method, defenses.repair), rows, user)
        tracker = None
        if fabric.is_global_zero:
            _claim(out, cfg, choices)
            tracker = Tracker(out, wandb_init(config, choices, job), cfg.resume)
            closing.push(partial(_close, tracker))
        setting = Setting(cfg, out, fabric, ranks, tracker, task, rows, user, base, base_key)
        metrics, answers = _stages(setting, defenses)
        if tracker is not None:  # judging is done by the first rank; the others have nothing left to do
            if judges:
                write_text(out / METRICS, json.dumps(metrics, indent=2))  # a judge may fail
                metrics |= judge(judges, answers, out, cache_folder(cfg.cache_dir))
            metrics["time/total_s"] = perf_counter() - started
            _leave(config, out, tracker, metrics, choices, task)
    return metrics


def _close(tracker: Tracker, kind: type[BaseException] | None, *_: Any) -> None:
    """Close the W&B run, as failed where an exception of this kind ends it."""
    tracker.finish(failed=kind is not None)


@dataclass(frozen=True)
class Defenses:
    """What defends in the stages that run, by config group."""

    curate: Curate | None = None
    align: Method | None = None
    method: Method | None = None
    repair: Repair | None = None

    @property
    def there(self) -> dict[str, Defense]:
        """Those that there are."""
        return {group: defense for group, defense in vars(self).items() if defense is not None}


def _defenses(cfg: DictConfig) -> Defenses:
    configured: dict[str, Any] = {group: cfg[group] for group in defending(dict(flat(plain(cfg))))}
    if "align" in configured:
        configured["align"] = cfg.align.method
    if "repair" in configured:
        configured["repair"] = {name: own for name, own in plain(cfg.repair).items() if name != "reference"}
    return Defenses(**{group: instantiate(own) for group, own in configured.items()})


def _stages(setting: Setting, defenses: Defenses) -> tuple[Metrics, list[Answer]]:
    """Run the chosen stages but for the judges; without `align` the base model stands for the aligned one."""
    cfg = setting.cfg
    overlap = setting.rows.overlap
    metrics: Metrics = {
        "seed": cfg.seed,
        "code": setting.origin["code"],
        "inputs": _inputs(setting, defenses),
        "threads": torch.get_num_threads(),
        "rows/overlap": sum(overlap.values()),
    }
    metrics |= {f"rows/overlap/{pair}": count for pair, count in overlap.items()}
    model, answers = setting.base, []
    if defenses.align:
        rows = setting.rows.alignment
        if defenses.curate:
            rows, found = curate(setting, defenses.curate)
            metrics |= found
        model, found = align(setting, rows, defenses.align)
        metrics |= found
    if "evaluate" in cfg.stages:
        answers, found = evaluate(setting, "aligned", model, [])
        metrics |= found
    if defenses.method is None:
        return metrics, answers
    aligned = model
    model, found = finetune(setting, aligned, defenses.method)
    metrics |= found
    if defenses.repair:
        model, found = repair(setting, aligned, model, defenses.repair)
        metrics |= found
    if setting.fabric.is_global_zero and model.adapter is not None:
        with explained(setting.out):
            shutil.copytree(model.adapter, setting.out / "adapter", dirs_exist_ok=True)
            name_base(setting.out / "adapter", str(model.folder))  # the cache may have moved since it was made
    if "evaluate" in cfg.stages:
        own, found = evaluate(setting, "final", model, answers)
        found["time/evaluate_s"] += metrics["time/evaluate_s"]
        found["memory/evaluate_mib"] = max(found["memory/evaluate_mib"], metrics["memory/evaluate_mib"])
        metrics |= found
        answers = [*answers, *own]
    return metrics, answers


def _inputs(setting: Setting, defenses: Defenses) -> str:
    """A hash of what a run is made from beside its config and this package: rows, the base model, a user's classes."""
    own = {name: own_code(made) for name, made in {**defenses.there, "task": setting.task}.items()}
    return digest([setting.origin["base"], contents(setting.cfg.source), own])


def _judge_stored(cfg: DictConfig, out: Path, judges: Judges) -> Metrics:
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
        _page(config, out, metrics, curves, choices, task)
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


def _refuse_used(out: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Raise UserError where the output folder holds another run, or this one and `resume` is not set."""
    used = any((out / name).exists() for name in ("checkpoints", CURVES, METRICS))
    if used and not resume:
        raise UserError(f"{out} holds a run; add resume=true to go on with it, or give another hydra.run.dir")
    if resume and not used:
        log.warning("Nothing to resume in %s: the run starts anew.", out)
    if used and (earlier := read_config(out)) is not None:
        refuse_other_run(*(of_result(c, MAY_CHANGE) for c in (earlier, config)))
    read_metrics(out)


def _claim(out: Path, cfg: DictConfig, choices: dict[str, str]) -> None:
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


def _leave(
    config: Mapping[str, Any], out: Path, tracker: Tracker, metrics: Metrics, choices: dict[str, str], task: Task
) -> None:
    """Everything that a person looks at: metrics.json, report.html, the W&B summary, the table in the terminal."""
    shown = _page(config, out, metrics, tracker.curves.rows(), choices, task)
    tracker.summarize(metrics, [asdict(told.answer) | {"verdict": told.verdict} for told in shown])
    write_text(out / METRICS, json.dumps(metrics, indent=2))  # last but the seal: it says that the run is at its end
    seal(out)
    terminal(out, metrics, tracker.offline_folder, tracker.url)


def _page(
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


def _hush() -> None:
    """Keep libraries' greetings out of the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Warnings of libraries become lines of the log, which never share a line with a progress bar.
    logging.captureWarnings(True)
    for known in ("`is_gradient_checkpointing` is deprecated", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=known)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
