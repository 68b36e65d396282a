"""A run from its config to its output folder: refuse, run the stages, judge, leave what a person looks at."""

import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.base_model import base_model
from lisa_lightning.cache import cache_folder, digest, own_code
from lisa_lightning.config import WITHOUT_RESULT, flat, plain, refuse_other_run, saved
from lisa_lightning.cpu import keep_freed_memory
from lisa_lightning.curate.curate import Curate
from lisa_lightning.curves import CurveRow, read_rows
from lisa_lightning.data.mixing import user_rows
from lisa_lightning.data.source import contents, load_rows
from lisa_lightning.disk import explained, owned, read_json, write_text
from lisa_lightning.errors import UserError
from lisa_lightning.evaluate.evaluator import Answer, read_answers
from lisa_lightning.evaluate.judging import read_judged, read_responses, refuse_no_reference
from lisa_lightning.evaluate.scores import Metrics, verdict
from lisa_lightning.judge.judge import Judge
from lisa_lightning.method.method import Method
from lisa_lightning.needs import Defense, defending, refuse_unmet
from lisa_lightning.net import name_base, refuse_quantization
from lisa_lightning.processes import first_rank, launched, ranks, refuse_processes
from lisa_lightning.rehearsal import rehearse
from lisa_lightning.repair.repair import Repair
from lisa_lightning.report.page import Told, page, samples
from lisa_lightning.report.sweep import FAILED, complete
from lisa_lightning.report.terminal import terminal
from lisa_lightning.stages.align import align
from lisa_lightning.stages.curate import curate
from lisa_lightning.stages.evaluate import evaluate
from lisa_lightning.stages.finetune import finetune
from lisa_lightning.stages.judge import judge
from lisa_lightning.stages.reference import pairs
from lisa_lightning.stages.repair import repair
from lisa_lightning.stages.setting import Setting
from lisa_lightning.tracking import Tracker, wandb_init

log = logging.getLogger(__name__)
Judges = Mapping[str, Judge]
MAY_CHANGE = (*WITHOUT_RESULT, "stages", "judge", "responses")
"""Keys that a run and its resumption need not share."""


def run(cfg: DictConfig, job: str | None = None) -> Metrics:
    """Run the stages of `cfg` into Hydra's output folder and return what metrics.json holds.

    Args:
        job: its folder within its sweep, if it is a job of one.

    Raises:
        UserError: what the user can put right; see the modules that each stage calls.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    first = first_rank()
    with owned(out) if first else nullcontext():
        return _run(cfg, out, first, job)


def _run(cfg: DictConfig, out: Path, first: bool, job: str | None) -> Metrics:
    started = perf_counter()
    judges: Judges = {name: instantiate(own) for name, own in cfg.judge.items()} if "judge" in cfg.stages else {}
    _hush()
    if list(cfg.stages) == ["judge"]:
        return _judge_stored(cfg, out, judges)
    fabric = ranks(cfg.trainer)
    if job is not None:
        refuse_processes(fabric, cfg.trainer)
    task = get_class(cfg.task._target_)()
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
    if first:  # before the other ranks are there to wait
        _claim(out, cfg, choices)
    with launched(fabric):  # every rank runs all stages from here on, so that evaluation is shared out too
        out = Path(fabric.broadcast(str(out)))
        base, base_key = base_model(fabric, cfg.model, cache_folder(cfg.cache_dir))
        rehearse(base, cfg, defenses.align, defenses.method, defenses.repair)

        tracker = Tracker(out, wandb_init(plain(cfg), choices, job), cfg.resume) if fabric.is_global_zero else None
        failed = True
        try:
            setting = Setting(cfg, out, fabric, tracker, task, rows, user, base, base_key)
            metrics, answers = _stages(setting, defenses)
            if tracker is not None:  # judging is done by the first rank; the others have nothing left to do
                if judges:
                    write_text(out / "metrics.json", json.dumps(metrics, indent=2))  # a judge may fail
                    metrics |= judge(judges, answers, out, cache_folder(cfg.cache_dir))
                metrics["time/total_s"] = perf_counter() - started
                _leave(cfg, out, tracker, metrics, choices)
            failed = False
        finally:
            if tracker is not None:
                tracker.finish(failed)
    return metrics


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
    """Judge a file of answers, or anew those of the run that the output folder holds; nothing is generated."""
    if cfg.responses is not None and (out / "config.yaml").exists():
        raise UserError(
            f"{out} holds a run, whose verdicts would be lost; give another hydra.run.dir for {cfg.responses}"
        )
    if cfg.responses is not None:
        answers = read_responses(cfg.responses)
        refuse_no_reference(judges, answers, cfg.responses)
    else:
        answers = read_answers(out / "responses.jsonl")
    if not answers:
        raise UserError(
            f"{out} holds no answers to judge; name a run's folder as hydra.run.dir=FOLDER, or a file as responses=FILE"
        )
    metrics = read_json(out / "metrics.json") if cfg.responses is None else {}
    if cfg.responses is None and not complete(metrics):
        log.warning("The run in %s is not finished: answers may be missing, the longest prompts' first.", out)
    metrics |= judge(judges, answers, out, cache_folder(cfg.cache_dir))
    write_text(out / "metrics.json", json.dumps(metrics, indent=2))
    if cfg.responses is None and (out / "choices.json").exists():
        own = OmegaConf.load(out / "config.yaml")
        assert isinstance(own, DictConfig)
        _page(own, out, metrics, read_rows(out / "curves.csv"), read_json(out / "choices.json"))
    terminal(out, metrics, None, None)
    return metrics


def _claim(out: Path, cfg: DictConfig, choices: dict[str, str]) -> None:
    """Make the output folder ours: refuse one that holds another run, write down the config and what was chosen."""
    used = any((out / name).exists() for name in ("checkpoints", "curves.csv", "metrics.json"))
    if used and not cfg.resume:
        raise UserError(f"{out} holds a run; add resume=true to go on with it, or give another hydra.run.dir")
    if cfg.resume and not used:
        log.warning("Nothing to resume in %s: the run starts anew.", out)
    if used and (there := saved(out)) is not None:
        refuse_other_run(*({k: v for k, v in c.items() if k not in MAY_CHANGE} for c in (there, plain(cfg))))
    if (metrics := read_json(out / "metrics.json")).pop("time/total_s", None) is not None:
        write_text(out / "metrics.json", json.dumps(metrics, indent=2))  # it is at its end no longer
    (out / FAILED).unlink(missing_ok=True)  # what an earlier try failed by
    write_text(out / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    write_text(out / "choices.json", json.dumps(choices, indent=2))
    if not used:  # Hydra's own list of them is that of the last command here, even of one that is refused
        write_text(out / "overrides.yaml", OmegaConf.to_yaml(HydraConfig.get().overrides.task))
    log.info("Output goes to %s", out)  # a run that is killed has no last line that says so


def _leave(cfg: DictConfig, out: Path, tracker: Tracker, metrics: Metrics, choices: dict[str, str]) -> None:
    """Everything that a person looks at: metrics.json, report.html, the W&B summary, the table in the terminal."""
    shown = _page(cfg, out, metrics, tracker.curves.rows(), choices)
    tracker.summarize(metrics, [asdict(told.answer) | {"verdict": told.verdict} for told in shown])
    write_text(out / "metrics.json", json.dumps(metrics, indent=2))  # last: it says that the run is at its end
    terminal(out, metrics, tracker.offline_folder, tracker.url)


def _page(cfg: DictConfig, out: Path, metrics: Metrics, curves: list[CurveRow], choices: dict[str, str]) -> list[Told]:
    """Write report.html; the sample answers that it shows."""
    told = [j for j in read_judged(out / "judged.jsonl") if j.kind != "harmless" or j.refused is not None]
    judged = {(j.model, j.kind, j.index): j for j in reversed(told)}  # of the first judge that can tell
    task = get_class(cfg.task._target_)()
    answers = [
        Told(a, verdict(task, a, judged.get((a.model, a.kind, a.index)))) for a in read_answers(out / "responses.jsonl")
    ]
    page(out, metrics, curves, answers, choices, cfg)
    return samples(answers)


def _hush() -> None:
    """Keep libraries' greetings out of the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for known in ("`is_gradient_checkpointing` is deprecated", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=known)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
