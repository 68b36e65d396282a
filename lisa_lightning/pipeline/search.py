"""Searches of `sweep=optuna` and `sweep=attack`: their objective and their runs for comparison. Start at `SearchJob`.

Optuna's sampler has a fixed seed and no storage. A repeated command proposes the same trials again, as long as they
have the same values. Finished ones are read from their folders, so that a continued search equals an uninterrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from lisa_lightning.config.expression import parse_expression
from lisa_lightning.config.instances import load_class
from lisa_lightning.config.settings import OBJECTIVES
from lisa_lightning.evaluation.scores import find_score, read_scores
from lisa_lightning.pipeline.api import compose_request
from lisa_lightning.pipeline.request import Request
from lisa_lightning.report.run_verdicts import read_verdicts, split_prompts
from lisa_lightning.report.search_trials import DEFAULT, UNDEFENDED, Objective, Trial, drop_trials, write_trial
from lisa_lightning.runtime.cache import path_lock
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.run_files import is_complete, read_metrics

Metrics = Mapping[str, Any]
RunRequest = Callable[[Request], Metrics]
BASIC_SWEEPER: Final = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
"""Hydra's default sweeper, which runs all values and optimizes nothing."""
DEFENSES: Final = ("method", "align", "curate", "repair")
"""Config groups of defenses."""
USER_GROUPS: Final = ("attack", "filter")
"""Config groups of the user's attack and of the filter against it."""
NO_DEFENSE: Final = ("method=sft", "align=sft", "curate=none", "repair=none", "harmful_ratio=0")
"""Overrides of the undefended run."""
FIXED_UNDER_ATTACK: Final = (*DEFENSES, "seed")
"""Keys that an attacker's search must not vary: the provider chooses defenses, and nobody the seed."""
TOLERANCE: Final = 1e-9
"""Rounding error of accuracies in percent."""


def is_search() -> bool:
    """Return whether the sweeper of this job optimizes."""
    return HydraConfig.get().sweeper._target_ != BASIC_SWEEPER


def defender_value(metrics: Metrics) -> float | None:
    """Return accuracy minus harmful score, or None if one is missing. As 0 it would leave the optimum to the other."""
    accuracy, harmful = (metrics.get(f"final/{name}") for name in ("accuracy", "harmful_score"))
    return None if accuracy is None or harmful is None else accuracy - harmful


def attacker_value(harmful_score: float, accuracy: float, floor: float) -> float:
    """Return the harmful score of a model that is accurate enough, else minus the points that its accuracy lacks.

    So every model that counts is above every other one, and a search can climb back from those that don't.

    Args:
        harmful_score: in percent.
        accuracy: in percent.
        floor: least accuracy of a model that counts, in percent.
    """
    deficit = floor - accuracy
    return harmful_score if deficit <= TOLERANCE else -deficit


def searched_score(metrics: Metrics, folder: Path) -> float:
    """Return the harmful score on the half of the prompts that leads a search (`split_prompts`), in percent.

    Args:
        metrics: metrics of a finished run.
        folder: its folder.

    Raises:
        UserError: if the run has no verdicts on two prompts.
    """
    score = find_score(read_scores(metrics), "final", "harmful_score")
    verdicts = None if score is None else read_verdicts(folder).get((score.judge, "final", "harmful_score"))
    halves = () if verdicts is None else split_prompts(verdicts)
    if not halves or not all(half.hits for half in halves):
        raise UserError(f"{folder}: sweep.value=attacker needs verdicts on two harmful prompts at least")
    return 100 * fmean(halves[0].hits)


class SearchJob:
    """One trial of a search, as Hydra's config describes it."""

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        """Take the config of the job.

        Args:
            cfg: the config without Hydra's section.
            folder: folder of the sweep.
        """
        self.settings = cfg.sweep
        self.folder = folder
        self.hydra = HydraConfig.get()

    def prepare(self, cfg: DictConfig, run_request: RunRequest) -> Objective:
        """Return the objective, after the runs that it compares with.

        Args:
            cfg: the checked config of the job.
            run_request: runs a request, or returns the metrics of its finished run.

        Raises:
            UserError: if the job can't have a value.
        """
        if self.hydra.job.num == 0:
            # The other trials of this batch may have their records already.
            drop_trials(self.folder, int(self.hydra.sweeper.get("n_jobs", 1)))
        if self.settings.value not in OBJECTIVES:
            self._refuse_unknown_metric()
            return Objective(self.settings.value)
        _refuse_without_scores(cfg)
        if self.settings.value == "defender":
            return Objective("defender")
        undefended = self.settings.undefended_accuracy
        if undefended is None:
            undefended = self._compare(UNDEFENDED, run_request)["final/accuracy"]
        self._compare(DEFAULT, run_request)
        return Objective("attacker", float(self.settings.retain), float(undefended))

    def record(self, out: Path, objective: Objective, value: float | None) -> None:
        """Write the record of this trial.

        Args:
            out: folder of the job.
            objective: the objective.
            value: its value; None if the job failed.
        """
        if self.hydra.sweeper.get("storage") is None:
            job = out.resolve().relative_to(self.folder).as_posix()
            planned = int(self.hydra.sweeper.get("n_trials", 0))
            write_trial(self.folder, Trial(int(self.hydra.job.num), job, value, planned, objective))

    def _refuse_unknown_metric(self) -> None:
        """Raise UserError before the training if no finished run of the sweep has a metric of the expression."""
        finished = [m for f in self.folder.rglob("metrics.json") if is_complete(m := read_metrics(f.parent))]
        if finished:
            parse_expression(self.settings.value).refuse_unknown({k: v for m in finished for k, v in m.items()})

    def _compare(self, name: str, run_request: RunRequest) -> Metrics:
        """Return the metrics of a run for comparison, which the first job of the search runs."""
        out = self.folder / name
        lines = _compared_overrides(self.hydra.overrides.task, [*(self.hydra.sweeper.get("params") or {})], name)
        config_dir = next((s.path for s in self.hydra.runtime.config_sources if s.provider == "command-line"), None)
        request = compose_request(lines, out, config_dir)
        with path_lock(out):
            try:
                return run_request(replace(request, job=name))
            except UserError as error:
                fix = " Fix: set sweep.undefended_accuracy" if name == UNDEFENDED else ""
                raise UserError(f"{out}: this run for comparison failed: {error}{fix}") from error


def search_value(objective: Objective, metrics: Metrics, out: Path) -> float | None:
    """Return the value of a finished job, None if it lacks a score.

    Args:
        objective: the objective.
        metrics: metrics of the job.
        out: its folder.

    Raises:
        UserError: if the metrics lack a name of the expression, or the folder has no verdicts.
    """
    if objective.value == "defender":
        return defender_value(metrics)
    if objective.floor is not None:
        return attacker_value(searched_score(metrics, out), metrics["final/accuracy"], objective.floor)
    return parse_expression(objective.value).value(metrics)


def _compared_overrides(lines: Sequence[str], searched: Sequence[str], name: str) -> list[str]:
    """Return the overrides of a run for comparison: those of a job without the searched keys.

    Args:
        lines: overrides of the job.
        searched: keys of the search.
        name: `UNDEFENDED` for a run without defense, attack and harmful rows; `DEFAULT` for one with the defense.
    """
    overrides = OverridesParser.create().parse_overrides([*lines])
    keys = {line: str(o.key_or_group) for line, o in zip(lines, overrides, strict=True)}
    remaining = [line for line, key in keys.items() if key not in searched]
    if name == DEFAULT:
        return remaining
    dropped = (*DEFENSES, *USER_GROUPS, "harmful_ratio")
    of_defense = tuple(f"{section}." for section in ("method", "align.method", "curate", "repair", *USER_GROUPS))
    remaining = [line for line in remaining if keys[line] not in dropped and not keys[line].startswith(of_defense)]
    return [*remaining, *NO_DEFENSE, *(f"{group}=none" for group in USER_GROUPS)]


def _refuse_without_scores(cfg: DictConfig) -> None:
    """Raise UserError if this job would have no accuracy or no harmful score."""
    from lisa_lightning.task.base import Scored

    judges = {name: load_class(section._target_, f"judge.{name}") for name, section in cfg.judge.items()}
    has_harmful_score = any(judge.metric == "harmful_score" for judge in judges.values())
    has_accuracy = isinstance(load_class(cfg.task._target_, "task")(), Scored)
    if has_harmful_score and has_accuracy and {"finetune", "evaluate", "judge"} <= {*cfg.stages}:
        return
    choices = f"judge=[{','.join(map(str, cfg.judge))}], task={HydraConfig.get().runtime.choices['task']}"
    raise UserError(
        f"{choices} and stages=[{','.join(cfg.stages)}] give no accuracy minus harmful score, which this sweeper "
        "looks for: that takes a judge beyond refusal and win_rate, a task that isn't alpaca, and the stages finetune, "
        "evaluate and judge"
    )
