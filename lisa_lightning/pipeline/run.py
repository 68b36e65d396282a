"""A run from its request to its output folder: checks, ranks, stages, judges, report. Start at `run`."""

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig

from lisa_lightning.config.instances import build, load_class
from lisa_lightning.config.requirements import Defense, active_defenses, check_requirements
from lisa_lightning.config.validate import flat, plain
from lisa_lightning.curate.base import Selector
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.source import Row, Rows, content_hashes, load_rows
from lisa_lightning.evaluation.evaluator import Answer
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.judge.base import Judge
from lisa_lightning.logger.lightning_loggers import stage_loggers
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.logger.wandb import refuse_wandb_environment, wandb_init
from lisa_lightning.method.base import Method
from lisa_lightning.model.base_model import base_model
from lisa_lightning.model.lora import refuse_quantization, set_base_model_name
from lisa_lightning.pipeline.preflight import ModelDefenses, preflight
from lisa_lightning.pipeline.rejudge import rejudge
from lisa_lightning.pipeline.request import Request
from lisa_lightning.pipeline.run_folder import prepare_folder, refuse_used, write_report
from lisa_lightning.pipeline.stages.align import align
from lisa_lightning.pipeline.stages.curate import curate
from lisa_lightning.pipeline.stages.evaluate import evaluate
from lisa_lightning.pipeline.stages.finetune import finetune
from lisa_lightning.pipeline.stages.judge import judge
from lisa_lightning.pipeline.stages.reference import preference_pairs
from lisa_lightning.pipeline.stages.repair import repair
from lisa_lightning.pipeline.stages.setting import Model, Setting
from lisa_lightning.repair.base import Repair
from lisa_lightning.runtime.cache import cache_folder, short_hash, user_code_hash
from lisa_lightning.runtime.files import folder_lock, reraise_write_errors, write_text
from lisa_lightning.runtime.launch import is_rank_zero, launch_ranks, make_fabric, refuse_processes
from lisa_lightning.runtime.memory import keep_freed_memory
from lisa_lightning.runtime.ranks import Ranks
from lisa_lightning.runtime.run_files import METRICS
from lisa_lightning.task.base import Task

Judges = Mapping[str, Judge]


def run(request: Request) -> Metrics:
    """Run the stages of a request, and return the content of metrics.json.

    Neither logging nor signal handlers are changed, so that it can be called from any program.

    Raises:
        UserError: if the user can fix the problem; see the modules of the stages.
    """
    started = perf_counter()
    with folder_lock(request.out) if is_rank_zero() else nullcontext():
        judges = _judges(request.cfg)
        if list(request.cfg.stages) == ["judge"]:
            return rejudge(request, judges)
        return _run_stages_and_judges(request, judges, started)


def _judges(cfg: DictConfig) -> Judges:
    """Return the judges by name, {} if nothing is judged."""
    return {name: instantiate(section) for name, section in cfg.judge.items()} if "judge" in cfg.stages else {}


@dataclass(frozen=True)
class Defenses:
    """The defenses of the stages that run, by config group."""

    curate: Selector | None = None
    align: Method | None = None
    method: Method | None = None
    repair: Repair | None = None

    @property
    def by_group(self) -> dict[str, Defense]:
        """Config group -> defense, without groups that have none."""
        return {group: defense for group, defense in vars(self).items() if defense is not None}


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stages, which are checked and loaded before the ranks are launched."""

    fabric: Fabric
    task: Task
    defenses: Defenses
    rows: Rows
    """All sets of the source."""
    user: list[Row]
    """The user's rows, harmful ones included; [] without fine-tuning."""


def _run_stages_and_judges(request: Request, judges: Judges, started: float) -> Metrics:
    cfg, inputs = request.cfg, _load_inputs(request)
    if is_rank_zero():
        # The folder is checked before a model is downloaded.
        refuse_used(request.out, plain(cfg), cfg.resume)
    # Closing the W&B run may take minutes. By then the ranks no longer watch one another.
    with ExitStack() as closing, launch_ranks(inputs.fabric, cfg.trainer.timeout_min) as ranks:
        # The default folder contains the time, which differs between ranks.
        request = replace(request, out=Path(inputs.fabric.broadcast(str(request.out))))
        setting = _make_setting(request, inputs, ranks, closing)
        metrics, answers = _stages(setting, inputs.defenses)
        if setting.loggers is not None:
            # Only rank zero judges; the other ranks are done.
            if judges:
                # A judge may fail, which must not lose the metrics of the stages.
                write_text(request.out / METRICS, json.dumps(metrics, indent=2))
                metrics |= judge(judges, answers, request.out, setting.cache)
            metrics["time/total_s"] = perf_counter() - started
            write_report(request, setting.loggers, metrics, inputs.task)
    return metrics


def _load_inputs(request: Request) -> Inputs:
    """Check what does not need the model, and load the rows.

    Raises:
        UserError: if the environment, the defenses or the rows do not fit the config.
    """
    cfg = request.cfg
    refuse_wandb_environment()
    fabric = make_fabric(cfg.trainer)
    if request.job is not None:
        refuse_processes(fabric, cfg.trainer)
    task = load_class(cfg.task._target_, "task")()
    defenses = _defenses(cfg)
    check_requirements(defenses.by_group, dict(request.choices), cfg, fabric.world_size)
    needs_defender = any("defender_rows" in defense.requirements for defense in defenses.by_group.values())
    rows = load_rows(cfg.source, task, cfg.data.allow_overlap, needs_defender)
    if defenses.repair and "reference" in cfg.repair:
        # Rows without pairs are refused now rather than after the training.
        preference_pairs(rows)
    user = []
    if defenses.method:
        user = user_rows(rows, cfg.data.n, cfg.harmful_ratio, cfg.data.order, cfg.seed, defenses.method.safe_share)
    if cfg.model.quantize is not None:
        refuse_quantization()
    keep_freed_memory()
    return Inputs(fabric, task, defenses, rows, user)


def _defenses(cfg: DictConfig) -> Defenses:
    """Create the defenses of the stages that run."""
    config = plain(cfg)
    sections = {group: config[group] for group in active_defenses(dict(flat(config)))}
    keys = {group: "align.method" if group == "align" else group for group in sections}
    if "align" in sections:
        sections["align"] = sections["align"]["method"]
    return Defenses(**{group: build(section, keys[group]) for group, section in sections.items()})


def _make_setting(request: Request, inputs: Inputs, ranks: Ranks, closing: ExitStack) -> Setting:
    """Locate the base model, check that everything fits it, and open folder and loggers on rank zero.

    Args:
        request: the request, with the same folder on all ranks.
        inputs: the inputs of the stages.
        ranks: the launched ranks.
        closing: closes the W&B run at its exit.
    """
    cfg, out, defenses = request.cfg, request.out, inputs.defenses
    base, base_key = base_model(ranks, cfg.model, cache_folder(cfg.cache_dir))
    preflight(base, cfg, ModelDefenses(defenses.align, defenses.method, defenses.repair), inputs.rows, inputs.user)
    loggers = None
    if inputs.fabric.is_global_zero:
        prepare_folder(request)
        config = plain(cfg)
        wandb_arguments = wandb_init(config, dict(request.choices), request.job)
        loggers = RunLoggers(out, wandb_arguments, cfg.resume, partial(stage_loggers, config["logger"], out))
        closing.push(partial(_close, loggers))
    return Setting(cfg, out, inputs.fabric, ranks, loggers, inputs.task, inputs.rows, inputs.user, base, base_key)


def _close(loggers: RunLoggers, kind: type[BaseException] | None, *_: Any) -> None:
    """Close the W&B run, as failed if an exception ends the run."""
    loggers.wandb.finish(failed=kind is not None)


def _stages(setting: Setting, defenses: Defenses) -> tuple[Metrics, list[Answer]]:
    """Run all stages but judging. Without the stage `align`, the base model is fine-tuned."""
    cfg = setting.cfg
    metrics = _input_metrics(setting, defenses)
    aligned, answers = setting.base, []
    if defenses.align:
        aligned, align_metrics = _curate_and_align(setting, defenses.align, defenses.curate)
        metrics |= align_metrics
    if "evaluate" in cfg.stages:
        answers, evaluate_metrics = evaluate(setting, "aligned", aligned, [])
        metrics |= evaluate_metrics
    if defenses.method is None:
        return metrics, answers
    final, finetune_metrics = finetune(setting, aligned, defenses.method)
    metrics |= finetune_metrics
    if defenses.repair:
        final, repair_metrics = repair(setting, aligned, final, defenses.repair)
        metrics |= repair_metrics
    _copy_adapter(setting, final)
    if "evaluate" in cfg.stages:
        final_answers, evaluate_metrics = evaluate(setting, "final", final, answers)
        # The two evaluations count as one stage.
        evaluate_metrics["time/evaluate_s"] += metrics["time/evaluate_s"]
        peaks_mib = [m["memory/evaluate_mib"] for m in (evaluate_metrics, metrics)]
        metrics |= evaluate_metrics | {"memory/evaluate_mib": max(peaks_mib)}
        answers = [*answers, *final_answers]
    return metrics, answers


def _curate_and_align(setting: Setting, method: Method, selector: Selector | None) -> tuple[Model, Metrics]:
    """Align the base model on the alignment rows, of which a selector keeps a part."""
    rows, metrics = setting.rows.alignment, {}
    if selector:
        rows, metrics = curate(setting, selector)
    model, align_metrics = align(setting, rows, method)
    return model, metrics | align_metrics


def _copy_adapter(setting: Setting, model: Model) -> None:
    """Copy the model's adapter from the cache into the output folder; rank zero does."""
    if setting.fabric.is_global_zero and model.adapter is not None:
        with reraise_write_errors(setting.out):
            shutil.copytree(model.adapter, setting.out / "adapter", dirs_exist_ok=True)
            # The cache may have been moved since the adapter was trained.
            set_base_model_name(setting.out / "adapter", str(model.folder))


def _input_metrics(setting: Setting, defenses: Defenses) -> Metrics:
    """Return the metrics that identify the inputs of a run: seed, hashes, threads, and overlaps of the rows."""
    overlap = setting.rows.overlap
    return {
        "seed": setting.cfg.seed,
        "code": setting.origin["code"],
        "inputs": _inputs_hash(setting, defenses),
        "threads": torch.get_num_threads(),
        "rows/overlap": sum(overlap.values()),
        **{f"rows/overlap/{pair}": count for pair, count in overlap.items()},
    }


def _inputs_hash(setting: Setting, defenses: Defenses) -> str:
    """Return a hash of the inputs besides config and package: rows, the base model and user-defined classes."""
    user_code = {
        name: user_code_hash(instance) for name, instance in {**defenses.by_group, "task": setting.task}.items()
    }
    return short_hash([setting.origin["base"], content_hashes(setting.cfg.source), user_code])
