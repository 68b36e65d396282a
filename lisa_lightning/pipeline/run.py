"""A run from its config to its output folder: refuse, run the stages, judge, leave what a person looks at."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from lisa_lightning.config.instances import load_class, refuse_unknown_arguments
from lisa_lightning.config.requirements import Defense, defending, refuse_unmet
from lisa_lightning.config.validate import flat, plain
from lisa_lightning.curate.base import Curate
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.source import contents, load_rows
from lisa_lightning.evaluate.evaluator import Answer
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.judge.base import Judge
from lisa_lightning.logger.wandb import Tracker, refuse_wandb_environment, wandb_init
from lisa_lightning.method.base import Method
from lisa_lightning.model.base_model import base_model
from lisa_lightning.model.lora import name_base, refuse_quantization
from lisa_lightning.pipeline.preflight import Fit, preflight
from lisa_lightning.pipeline.rejudge import rejudge
from lisa_lightning.pipeline.run_folder import prepare_folder, refuse_used, write_report
from lisa_lightning.pipeline.stages.align import align
from lisa_lightning.pipeline.stages.curate import curate
from lisa_lightning.pipeline.stages.evaluate import evaluate
from lisa_lightning.pipeline.stages.finetune import finetune
from lisa_lightning.pipeline.stages.judge import judge
from lisa_lightning.pipeline.stages.reference import pairs
from lisa_lightning.pipeline.stages.repair import repair
from lisa_lightning.pipeline.stages.setting import Setting
from lisa_lightning.repair.base import Repair
from lisa_lightning.runtime.cache import cache_folder, digest, own_code
from lisa_lightning.runtime.files import explained, owned, write_text
from lisa_lightning.runtime.launch import fabric_of, first_rank, launched, refuse_processes
from lisa_lightning.runtime.logs import silence_libraries
from lisa_lightning.runtime.memory import keep_freed_memory
from lisa_lightning.runtime.run_files import (
    METRICS,
)

Judges = Mapping[str, Judge]


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
    silence_libraries()
    config = plain(cfg)
    refuse_unknown_arguments(config)
    judges: Judges = {name: instantiate(own) for name, own in cfg.judge.items()} if "judge" in cfg.stages else {}
    if list(cfg.stages) == ["judge"]:
        return rejudge(cfg, out, judges)
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
        refuse_used(out, config, cfg.resume)
    # Closing the W&B run may take a while: it waits until the ranks no longer watch one another.
    with ExitStack() as closing, launched(fabric, cfg.trainer.timeout_min) as ranks:
        out = Path(fabric.broadcast(str(out)))
        base, base_key = base_model(ranks, cfg.model, cache_folder(cfg.cache_dir))
        preflight(base, cfg, Fit(defenses.align, defenses.method, defenses.repair), rows, user)
        tracker = None
        if fabric.is_global_zero:
            prepare_folder(out, cfg, choices)
            tracker = Tracker(out, wandb_init(config, choices, job), cfg.resume)
            closing.push(partial(_close, tracker))
        setting = Setting(cfg, out, fabric, ranks, tracker, task, rows, user, base, base_key)
        metrics, answers = _stages(setting, defenses)
        if tracker is not None:  # judging is done by the first rank; the others have nothing left to do
            if judges:
                write_text(out / METRICS, json.dumps(metrics, indent=2))  # a judge may fail
                metrics |= judge(judges, answers, out, cache_folder(cfg.cache_dir))
            metrics["time/total_s"] = perf_counter() - started
            write_report(config, out, tracker, metrics, choices, task)
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
