"""The stages of a run in their order, from alignment rows to answers. Start at `run_stages`."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as call_once
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lisa_lightning.attack.base import Attack, RowSelector, WeightEdit
from lisa_lightning.config.requirements import Defense
from lisa_lightning.config.settings import AdapterTraining, RunSettings
from lisa_lightning.curate.base import Selector
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.mixing import UserRows, alignment_sample
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.engine.base import Engine
from lisa_lightning.engine.transformers import TransformersEngine
from lisa_lightning.evaluation.alpaca_eval import alpaca_eval_outputs
from lisa_lightning.evaluation.decoding import GREEDY
from lisa_lightning.evaluation.evaluator import Answer, Evaluator, held_out_questions, read_answers, write_answers
from lisa_lightning.evaluation.harness import Harness
from lisa_lightning.evaluation.metrics import mark_correct, task_scores
from lisa_lightning.evaluation.prompting import Prompting
from lisa_lightning.evaluation.scores import Metrics, Score, model_of_variant
from lisa_lightning.evaluation.token_kl import PositionKL, by_position, csv_text, kl_metrics
from lisa_lightning.evaluation.variants import Variant, asks_task_rows
from lisa_lightning.judge.base import Judge
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import set_base_model_name
from lisa_lightning.objective.loss_scale import LossScale
from lisa_lightning.pipeline.adapter_folder import complete_result
from lisa_lightning.pipeline.stages.align import align
from lisa_lightning.pipeline.stages.curate import curate
from lisa_lightning.pipeline.stages.edit import edit
from lisa_lightning.pipeline.stages.evaluate import evaluate
from lisa_lightning.pipeline.stages.filter import filter_rows
from lisa_lightning.pipeline.stages.finetune import curve_evaluation, finetune
from lisa_lightning.pipeline.stages.lm_eval import lm_eval
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.outliers import select_outliers
from lisa_lightning.pipeline.stages.reference import reference_adapter
from lisa_lightning.pipeline.stages.repair import repair
from lisa_lightning.pipeline.stages.select import select
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.pipeline.stages.supplied import Supplied, adopt
from lisa_lightning.pipeline.stages.token_kl import token_kl
from lisa_lightning.pipeline.stages.train import AdapterTrainer
from lisa_lightning.repair.base import Repair
from lisa_lightning.runtime.files import reraise_write_errors, write_text
from lisa_lightning.runtime.run_files import ADAPTER, MODEL, RESPONSES, TOKEN_KL
from lisa_lightning.task.base import Scored, Task


@dataclass(frozen=True)
class Defenses:
    """The defenses of the stages that run, by config group."""

    curate: Selector | None = None
    align: Method | None = None
    method: Method | None = None
    repair: Repair | None = None
    reference: Mapping[str, Method] | None = None
    """Methods of the phases of a reference adapter: `sft`, and `dpo` for NLSR."""

    @property
    def by_group(self) -> dict[str, Defense]:
        """Config group -> defense, without groups that have none."""
        groups = {"curate": self.curate, "align": self.align, "method": self.method, "repair": self.repair}
        return {group: defense for group, defense in groups.items() if defense is not None}


@dataclass(frozen=True)
class Inputs:
    """Inputs of the stages, which are checked and loaded before the ranks are launched."""

    settings: RunSettings
    fabric: Fabric
    task: Task
    defenses: Defenses
    callbacks: Mapping[str, Any]
    """Config group `callbacks`: name -> `_target_` and arguments."""
    rows: Rows
    """All sets of the source."""
    user: list[Row]
    """The user's rows, harmful ones included, as the method mixes them; [] without fine-tuning."""
    prompting: Prompting
    """The prompts of the evaluation."""
    variants: Mapping[str, Variant] = field(default_factory=dict)
    """Further evaluations by name."""
    kl_rows: Sequence[Row] = ()
    """Harmful rows on which the divergence from the initial model is measured."""
    harness: Harness | None = None
    """Tasks for general utility."""
    supplied: Supplied | None = None
    """Adapter that the user supplies, instead of one that is trained."""
    engine: Engine = field(default_factory=TransformersEngine)
    """Generates the answers."""
    attack: Attack = field(default_factory=Attack)
    """The attack of the user."""
    filters: Mapping[str, Judge] = field(default_factory=dict)
    """Judges that remove user rows before fine-tuning, by name."""
    submitted: UserRows = field(default_factory=lambda: UserRows([], []))
    """The rows that the user submits, before a filter and the method see them."""


@dataclass(frozen=True)
class Tools:
    """Objects that stages work with."""

    cache: StageCache
    models: ModelSource
    encoder: Encoder
    trainer: AdapterTrainer
    evaluator: Evaluator
    out: Path
    """The output folder of the run."""
    tokenizer_folder: Path
    """Folder of the model whose tokenizer encodes prompts and rows."""


@dataclass(frozen=True)
class StageResults:
    """Results of all stages but judging."""

    metrics: Metrics
    scores: list[Score]
    """Scores of the task."""
    answers: list[Answer]
    token_kl: Sequence[PositionKL] = ()
    """Divergence from the initial model by token."""
    user: Sequence[Row] = ()
    """Rows of the user that the model was fine-tuned on."""


def run_stages(inputs: Inputs, tools: Tools) -> StageResults:
    """Run all stages but judging. Without the stage `align`, the base model is fine-tuned."""
    if inputs.supplied is not None:
        return _repair_supplied(inputs, tools, inputs.supplied)
    settings, defenses = inputs.settings, inputs.defenses
    evaluates = "evaluate" in settings.stages
    aligned, metrics = _align(inputs, tools)
    results = StageResults(metrics, [], [])
    if evaluates:
        results = _evaluate(inputs, tools, "aligned", aligned, results)
    if defenses.method is None:
        return results
    inputs, submit_metrics = _submit(inputs, tools, aligned, defenses.method)
    results.metrics.update(submit_metrics)
    results = replace(results, user=inputs.user)
    final, finetune_metrics = _finetune(inputs, tools, aligned, defenses.method)
    results.metrics.update(finetune_metrics)
    if defenses.repair is not None:
        final, repair_metrics = _repair(inputs, tools, aligned, final, defenses.repair)
        results.metrics.update(repair_metrics)
    return _finish(inputs, tools, final, results)


def _repair_supplied(inputs: Inputs, tools: Tools, supplied: Supplied) -> StageResults:
    """Evaluate the adapter that the user supplies, repair it, and evaluate it again."""
    aligned, unrepaired = adopt(tools.cache, tools.models, inputs.fabric, supplied)
    results = StageResults({}, [], [])
    if "evaluate" in inputs.settings.stages:
        results = _evaluate(inputs, tools, "aligned", unrepaired, results)
    if inputs.defenses.repair is None:
        return results
    repaired, metrics = _repair(inputs, tools, aligned, unrepaired, inputs.defenses.repair)
    results.metrics.update(metrics)
    return _finish(inputs, tools, repaired, results)


def _finish(inputs: Inputs, tools: Tools, final: Model, results: StageResults) -> StageResults:
    """Put the final adapter or model into the output folder, and return the results with its evaluation."""
    if inputs.fabric.is_global_zero:
        if final.adapter is None:
            _link_model(final.folder, tools.out / MODEL)
        else:
            _copy_adapter(final, tools.out / ADAPTER)
        complete_result(tools.out, tools.tokenizer_folder, inputs.settings.model.id)
    if "evaluate" not in inputs.settings.stages:
        return results
    return _evaluate(inputs, tools, "final", final, results)


def _align(inputs: Inputs, tools: Tools) -> tuple[Model, Metrics]:
    """Return the aligned model, trained on the alignment rows or on those that a selector keeps."""
    defenses, settings = inputs.defenses, inputs.settings.align
    rows, metrics = inputs.rows.alignment, {}
    if defenses.align is None:
        return tools.models.base, {}
    if defenses.curate is not None:
        rows, metrics = curate(
            tools.cache,
            tools.models,
            tools.encoder,
            inputs.fabric,
            defenses.curate,
            settings,
            rows,
            _defender_rows(inputs, defenses.curate),
            LossScale() if inputs.settings.trainer.precision == "16-mixed" else None,
            tools.trainer.checkpoints,
            tools.trainer.checkpoint_steps,
        )
    model, align_metrics = align(
        tools.cache,
        tools.models,
        tools.trainer,
        inputs.fabric,
        defenses.align,
        settings,
        {"alignment": rows, "defender": _defender_rows(inputs, defenses.align)},
    )
    return model, metrics | align_metrics


def mix_rows(method: Method, submitted: UserRows, rows: Rows, settings: RunSettings) -> list[Row]:
    """Return the rows that a method fine-tunes on in place of those that the user submits.

    Args:
        method: the method.
        submitted: the user's rows.
        rows: all sets of the source.
        settings: the settings of the run.
    """
    return method.mix(submitted.all, partial(alignment_sample, rows, settings.data.order, settings.seed))


def _submit(inputs: Inputs, tools: Tools, aligned: Model, method: Method) -> tuple[Inputs, Metrics]:
    """Return the inputs with the rows to fine-tune on: what the filters leave of those that the user submits."""
    submitted, metrics = inputs.submitted, {}
    if isinstance(inputs.attack, RowSelector):
        submitted, metrics = select_outliers(
            tools.cache,
            tools.models,
            tools.encoder,
            inputs.fabric,
            aligned,
            inputs.attack,
            inputs.rows,
            submitted,
            inputs.settings,
        )
    if inputs.filters:
        submitted, filter_metrics = filter_rows(tools.cache, inputs.fabric, inputs.filters, submitted)
        metrics |= filter_metrics
    if submitted is inputs.submitted:
        return inputs, {}
    user = mix_rows(method, submitted, inputs.rows, inputs.settings)
    return replace(inputs, user=user, submitted=submitted), metrics


def _finetune(inputs: Inputs, tools: Tools, aligned: Model, method: Method) -> tuple[Model, Metrics]:
    """Return the fine-tuned model, trained with all alignment rows or with those that the method selects."""
    if isinstance(inputs.attack, WeightEdit):
        return edit(tools.cache, tools.models, tools.encoder, inputs.fabric, aligned, inputs.attack, inputs.rows)
    settings, metrics = inputs.settings, {}
    rows: dict[Stream, Sequence[Row]] = {"alignment": inputs.rows.alignment, "user": inputs.user}
    if method.selection is not None:
        rows["alignment"], metrics = select(
            tools.cache,
            tools.models,
            tools.encoder,
            inputs.fabric,
            aligned,
            method.selection,
            rows,
            settings.evaluate.batch_size,
        )
    rows["defender"] = _defender_rows(inputs, method)
    model, finetune_metrics = finetune(
        tools.cache,
        tools.models,
        tools.trainer,
        inputs.fabric,
        aligned,
        method,
        settings.finetune,
        rows,
        discard=settings.data.during_alignment == "discard",
        # Points of a curve compare steps, which draws would blur.
        curve=curve_evaluation(replace(tools.evaluator, decoding=GREEDY), inputs.task, inputs.rows, settings.evaluate),
        callbacks=inputs.callbacks,
    )
    return model, metrics | finetune_metrics


def _repair(inputs: Inputs, tools: Tools, aligned: Model, finetuned: Model, defense: Repair) -> tuple[Model, Metrics]:
    settings, methods = inputs.settings, inputs.defenses.reference
    reference, reference_metrics = None, {}
    if methods is not None:
        assert settings.reference is not None
        assert settings.lora is not None
        # Repairs compare the reference with the adapter, factor by factor.
        supplied, lora = inputs.supplied, settings.lora
        lora = lora if supplied is None else supplied.adapter.lora(lora.dropout)
        training = AdapterTraining(settings.align.seed, lora, settings.optim)
        reference, reference_metrics = reference_adapter(
            tools.cache,
            tools.models,
            tools.trainer,
            inputs.fabric,
            aligned,
            methods,
            settings.reference,
            training,
            inputs.rows,
        )
    model, metrics = repair(
        tools.cache,
        tools.models,
        tools.encoder,
        inputs.fabric,
        aligned,
        finetuned,
        defense,
        {"alignment": inputs.rows.alignment, "defender": _defender_rows(inputs, defense)},
        settings.evaluate.batch_size,
        reference,
    )
    return model, metrics | reference_metrics


def _evaluate(inputs: Inputs, tools: Tools, name: str, model: Model, results: StageResults) -> StageResults:
    """Return the results with the answers of a further model, also in every variant, and its general utility."""
    evaluator = tools.evaluator
    # All variants and tasks read one copy in memory.
    load = call_once(partial(tools.models.serve, model, inputs.fabric.device))
    results = _answer(inputs, tools, evaluator, name, model, load, results)
    if inputs.fabric.is_global_zero and not isinstance(inputs.task, Scored):
        generator = f"{Path(inputs.settings.model.id or 'tiny').name}-{name}"
        answers = [answer for answer in results.answers if answer.model == name]
        write_text(tools.out / f"alpaca_eval_{name}.json", alpaca_eval_outputs(answers, generator))
    for variant, options in inputs.variants.items():
        variant_name = model_of_variant(name, variant)
        results = _answer(inputs, tools, options.apply(evaluator), variant_name, model, load, results)
    if inputs.kl_rows and model != tools.models.base:
        results = _measure_kl(inputs, tools, name, model, results)
    if inputs.harness is None:
        return results
    precision = inputs.settings.trainer.precision
    utility, costs = lm_eval(tools.cache, evaluator, precision, inputs.harness, name, model, load)
    metrics = results.metrics | utility
    for cost in costs:
        metrics = _add_cost(metrics, "lm_eval", cost)
    return replace(results, metrics=metrics)


def _answer(
    inputs: Inputs,
    tools: Tools,
    evaluator: Evaluator,
    name: str,
    model: Model,
    load: Callable[[], Any],
    results: StageResults,
) -> StageResults:
    """Return the results with the answers of a further model under the prompts of an evaluator."""
    path, is_own = tools.out / RESPONSES, evaluator is tools.evaluator
    task_rows = None if is_own or asks_task_rows(evaluator, tools.evaluator) else 0
    questions = held_out_questions(inputs.rows, task=task_rows, samples=evaluator.decoding.samples)
    generated, cost = evaluate(tools.cache, tools.models, evaluator, inputs.engine, name, model, load, questions, path)
    answers = mark_correct(inputs.task, generated)
    if inputs.fabric.is_global_zero:
        _write_responses(path, results.answers, answers)
    scores = task_scores(inputs.task, name, answers)
    metrics = _add_cost(results.metrics, "evaluate", cost)
    return replace(results, metrics=metrics, scores=[*results.scores, *scores], answers=[*results.answers, *answers])


def _measure_kl(inputs: Inputs, tools: Tools, name: str, model: Model, results: StageResults) -> StageResults:
    """Return the results with a further model's divergence from the initial model, and write token_kl.csv."""
    divergences, cost = token_kl(tools.cache, tools.models, tools.evaluator, model, inputs.kl_rows)
    positions = [*results.token_kl, *by_position(name, divergences)]
    if inputs.fabric.is_global_zero:
        write_text(tools.out / TOKEN_KL, csv_text(positions))
    metrics = _add_cost(results.metrics | kl_metrics(name, divergences), "token_kl", cost)
    return replace(results, metrics=metrics, token_kl=positions)


def _write_responses(path: Path, earlier: Sequence[Answer], answers: Sequence[Answer]) -> None:
    """Write responses.jsonl. A killed run may have begun the answers of a later model, which stay in the file."""
    finished = {answer.model for answer in (*earlier, *answers)}
    unfinished = [answer for answer in read_answers(path) if answer.model not in finished]
    write_answers(path, [*earlier, *answers, *unfinished])


def _add_cost(metrics: Metrics, stage: str, cost: Metrics) -> Metrics:
    """Return the metrics with a further cost of a stage that runs several times."""
    seconds, peak_mib = f"time/{stage}_s", f"memory/{stage}_mib"
    return metrics | {
        seconds: metrics.get(seconds, 0) + cost[seconds],
        peak_mib: max(metrics.get(peak_mib, 0), cost[peak_mib]),
    }


def _defender_rows(inputs: Inputs, defense: Defense) -> list[Row]:
    """Return the defender rows if the defense needs them, else [], so that its result does not depend on them."""
    return inputs.rows.defender if "defender_rows" in defense.requirements else []


def _copy_adapter(model: Model, folder: Path) -> None:
    """Copy the model's adapter from the cache into the output folder."""
    assert model.adapter is not None
    with reraise_write_errors(folder.parent):
        shutil.copytree(model.adapter, folder, dirs_exist_ok=True)
        # The cache may have been moved since the adapter was trained.
        set_base_model_name(folder, str(model.folder))


def _link_model(model: Path, folder: Path) -> None:
    """Link the weights of a fully fine-tuned model in the cache into the output folder, and copy its configs.

    Weights are gigabytes. A link outlives the cache, and takes no space while both exist.
    """
    with reraise_write_errors(folder.parent):
        folder.mkdir(exist_ok=True)
        for file in (*model.glob("*.safetensors"), *model.glob("*config.json"), *model.glob("*.index.json")):
            target = folder / file.name
            target.unlink(missing_ok=True)
            # Nothing but the weights is linked, since other files are written again.
            if file.suffix == ".safetensors" and _try_link(file, target):
                continue
            shutil.copy2(file, target)


def _try_link(file: Path, target: Path) -> bool:
    """Link a file, and return whether the file system allows it."""
    try:
        os.link(file, target)
    except OSError:
        return False
    return True
