"""A run from its request to its output folder: checks, ranks, stages, judges, report. Start at `run`."""

import json
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from hydra.utils import instantiate
from torch.distributed.device_mesh import init_device_mesh

from lisa_lightning.attack.base import Attack
from lisa_lightning.config.instances import build
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.requirements import active_defenses, check_requirements
from lisa_lightning.config.settings import Evaluate, RunSettings
from lisa_lightning.config.validate import flat, plain
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.mixing import UserRows, other_harmful_rows, user_rows
from lisa_lightning.data.source import content_hashes, load_rows
from lisa_lightning.data.templates import TEMPLATE_KEY
from lisa_lightning.engine.transformers import TransformersEngine
from lisa_lightning.evaluation.baselines import accuracy_baselines
from lisa_lightning.evaluation.decoding import Decoding
from lisa_lightning.evaluation.evaluator import Evaluator, read_answers
from lisa_lightning.evaluation.harness import load_harness
from lisa_lightning.evaluation.judging import read_judged
from lisa_lightning.evaluation.metrics import steps_until_harmful
from lisa_lightning.evaluation.prompting import EVALUATE_KEY, NO_TRIGGER, Prompting
from lisa_lightning.evaluation.scores import Metrics, score_metrics
from lisa_lightning.evaluation.variants import Variant
from lisa_lightning.judge.base import Judge
from lisa_lightning.logger.lightning_loggers import stage_loggers
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.logger.wandb import refuse_wandb_environment, wandb_init
from lisa_lightning.model.base_model import base_model
from lisa_lightning.model.lora import load_tokenizer, refuse_quantization
from lisa_lightning.pipeline.preflight import preflight
from lisa_lightning.pipeline.rejudge import rejudge
from lisa_lightning.pipeline.request import Request
from lisa_lightning.pipeline.run_folder import Results, prepare_folder, refuse_used, write_report
from lisa_lightning.pipeline.stage_sequence import Defenses, Inputs, StageResults, Tools, mix_rows, run_stages
from lisa_lightning.pipeline.stages.judge import judge
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.reference import preference_pairs
from lisa_lightning.pipeline.stages.stage_cache import StageCache, run_origin
from lisa_lightning.pipeline.stages.supplied import read_supplied
from lisa_lightning.pipeline.stages.train import AdapterTrainer
from lisa_lightning.runtime.cache import cache_folder, package_hash, short_hash, user_code_hash
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import drop_unused, folder_lock, write_text
from lisa_lightning.runtime.launch import launch_ranks, make_fabric, refuse_processes
from lisa_lightning.runtime.memory import keep_freed_memory
from lisa_lightning.runtime.ranks import Ranks, is_rank_zero
from lisa_lightning.runtime.run_files import JUDGED, METRICS, RESPONSES
from lisa_lightning.runtime.shared_folders import require_shared_folders

Judges = Mapping[str, Judge]


def run(request: Request) -> Metrics:
    """Run the stages of a request, and return the content of metrics.json.

    Neither logging nor signal handlers are changed, so that it can be called from any program.

    Raises:
        UserError: if the user can fix the problem; see the modules of the stages.
    """
    started = perf_counter()
    with folder_lock(request.out) if is_rank_zero() else nullcontext():
        config = plain(request.cfg)
        judges = _judges(config)
        if config["stages"] == ["judge"]:
            return rejudge(request, judges)
        return _run_stages_and_judges(request, config, judges, started)


def _judges(config: Mapping[str, Any]) -> Judges:
    """Return the judges by name, {} if nothing is judged."""
    if "judge" not in config["stages"]:
        return {}
    return {name: instantiate(section) for name, section in config["judge"].items()}


def _run_stages_and_judges(request: Request, config: dict[str, Any], judges: Judges, started: float) -> Metrics:
    inputs = _load_inputs(request, config)
    settings, fabric = inputs.settings, inputs.fabric
    if is_rank_zero():
        # The folder is checked before a model is downloaded.
        refuse_used(request.out, config, settings.resume)
    # Closing the W&B run may take minutes. By then the ranks no longer watch one another.
    with ExitStack() as closing, launch_ranks(fabric, settings.trainer.timeout_min) as ranks:
        # The default folder contains the time, which differs between ranks.
        out, cache = Path(fabric.broadcast(str(request.out))), cache_folder(settings.cache_dir)
        if request.out != out:
            drop_unused(request.out)
        request = replace(request, out=out)
        if settings.trainer.num_nodes > 1:
            require_shared_folders(ranks, {"cache_dir": cache, "hydra.run.dir": out})
        base, base_key = base_model(ranks, settings.model, cache)
        preflight(base, inputs)
        loggers = _open_loggers(request, config, closing) if fabric.is_global_zero else None
        stages = run_stages(inputs, make_tools(inputs, request.out, ranks, loggers, Model(base), base_key))
        metrics = _input_metrics(inputs, base_key) | stages.metrics
        if loggers is not None:
            # Only rank zero fits baselines and judges; the other ranks are done.
            if "evaluate" in settings.stages:
                metrics |= accuracy_baselines(inputs.task, inputs.rows, stages.user)
            metrics |= steps_until_harmful(loggers.curves.rows("finetune"), settings.evaluate.harmful_threshold)
            results = _judge(replace(stages, metrics=metrics), judges, request.out, cache)
            results.metrics["time/total_s"] = perf_counter() - started
            write_report(request, loggers, results, inputs.task)
            return results.metrics
    return metrics


def _judge(stages: StageResults, judges: Judges, out: Path, cache: Path) -> Results:
    """Return the results of the stages with verdicts and scores of the judges."""
    metrics = stages.metrics | score_metrics(stages.scores)
    # Without the stage `evaluate`, a resumed run has the answers of its first attempt.
    answers = stages.answers or read_answers(out / RESPONSES)
    if not judges:
        return Results(metrics, stages.scores, answers, read_judged(out / JUDGED))
    # A judge may fail, which must not lose the metrics of the stages.
    write_text(out / METRICS, json.dumps(metrics, indent=2))
    judgment = judge(judges, stages.answers, out, cache)
    metrics |= score_metrics(judgment.scores) | judgment.metrics
    return Results(metrics, [*judgment.scores, *stages.scores], answers, judgment.judged)


def _load_inputs(request: Request, config: dict[str, Any]) -> Inputs:
    """Check what does not need the model, and load the rows.

    Raises:
        UserError: if the environment, the defenses, the rows or the tasks of the harness do not fit the config.
    """
    settings = parse_settings(config)
    refuse_wandb_environment()
    fabric = make_fabric(settings.trainer)
    if request.job is not None:
        refuse_processes(fabric, settings.trainer)
    task = build(config["task"], "task")
    engine = build(config["engine"], "engine") if "evaluate" in settings.stages else TransformersEngine()
    defenses = build_defenses(config)
    attack = _build_attack(config, request.choices, settings)
    check_requirements({**defenses.by_group, "attack": attack}, request.choices, settings, fabric.world_size)
    needs_defender = any("defender_rows" in defense.requirements for defense in defenses.by_group.values())
    data = settings.data
    rows = load_rows(settings.source, task, data.allow_overlap, needs_defender, data.strip)
    if defenses.reference and "dpo" in defenses.reference:
        # Rows without pairs are refused now rather than after the training.
        preference_pairs(rows)
    submitted, user = UserRows([], []), []
    if defenses.method:
        share = settings.harmful_ratio
        submitted = user_rows(rows, data.n, share, data.order, settings.seed, defenses.method.safe_share)
        submitted = attack.rows(submitted)
        user = mix_rows(defenses.method, submitted, rows, settings)
    evaluates = "evaluate" in settings.stages
    kl_rows = other_harmful_rows(rows, user, settings.evaluate.kl_rows) if evaluates else []
    if settings.model.quantize is not None:
        refuse_quantization()
    keep_freed_memory()
    return Inputs(
        settings,
        fabric,
        task,
        defenses,
        config["callbacks"],
        rows,
        user,
        build_prompting(config, settings),
        build_variants(config, settings),
        kl_rows,
        load_harness(settings.evaluate) if evaluates else None,
        read_supplied(settings),
        engine,
        attack,
        _build_filters(config),
        submitted,
    )


def _build_attack(config: Mapping[str, Any], choices: Mapping[str, str], settings: RunSettings) -> Attack:
    """Return the attack, one that changes nothing for `attack=none`.

    Raises:
        UserError: if the config contradicts the attack.
    """
    attack = build(config["attack"], "attack") if config["attack"] else Attack()
    attack.check(settings, choices)
    return attack


def _build_filters(config: Mapping[str, Any]) -> Judges:
    """Return the judges that remove user rows by name, {} if nothing is fine-tuned.

    Raises:
        UserError: if one of them does not judge harm.
    """
    if "finetune" not in config["stages"]:
        return {}
    filters = {name: instantiate(section) for name, section in config["filter"].items()}
    for name, instance in filters.items():
        if instance.metric != "harmful_score":
            raise UserError(f"filter={name}: it judges no harm. Fix: filter=embedded, moderation or llama_guard")
    return filters


def build_defenses(config: Mapping[str, Any]) -> Defenses:
    """Return the defenses of the stages that run.

    Args:
        config: the nested config, resolved.
    """
    defenses: dict[str, Any] = {}
    for group in active_defenses(dict(flat(config))):
        section, key = (config[group]["method"], "align.method") if group == "align" else (config[group], group)
        defenses[group] = build(section, key)
    if "repair" in defenses and "reference" in config["repair"]:
        reference = config["repair"]["reference"]
        defenses["reference"] = {
            name: build(reference[name]["method"], f"repair.reference.{name}.method")
            for name in ("sft", "dpo")
            if name in reference
        }
    return Defenses(**defenses)


def build_prompting(config: Mapping[str, Any], settings: RunSettings, options: Evaluate | None = None) -> Prompting:
    """Return the prompts of the evaluation, with the trigger of the method unless `evaluate.prefix` replaces it.

    The method counts without the stage finetune too, so that a model that it has trained can be evaluated as served.

    Args:
        config: the nested config, resolved.
        settings: its settings.
        options: options of a variant; None for those of section `evaluate`.
    """
    options = options or settings.evaluate
    trained, method = settings.model.template, config.get("method")
    trigger = build(method, "method").trigger if options.prefix is None and method else None
    template = options.template or trained
    key = TEMPLATE_KEY if template == trained else EVALUATE_KEY
    texts = (options.system or "", options.prefix or "")
    return Prompting(template, *texts, trigger or NO_TRIGGER, key, options.prefill or "", options.wrapper or "")


def build_variants(config: Mapping[str, Any], settings: RunSettings) -> dict[str, Variant]:
    """Return the further evaluations by name. One without options is the run's own evaluation, and omitted."""
    changed = {name: options for name, options in (settings.evaluate.variants or {}).items() if options}
    options_of = {name: replace(settings.evaluate, **options) for name, options in changed.items()}
    return {
        name: Variant(build_prompting(config, settings, options), _build_decoding(options, settings.seed))
        for name, options in options_of.items()
    }


def _build_decoding(options: Evaluate, seed: int) -> Decoding:
    return Decoding(options.samples, options.temperature, options.top_p, seed)


def _open_loggers(request: Request, config: dict[str, Any], closing: ExitStack) -> RunLoggers:
    """Prepare the output folder and open the loggers. The W&B run ends at the exit of `closing`."""
    prepare_folder(request)
    wandb_arguments = wandb_init(config, dict(request.choices), request.job)
    further_loggers = partial(stage_loggers, config["logger"], request.out)
    loggers = RunLoggers(request.out, wandb_arguments, config["resume"], further_loggers)
    closing.push(partial(_close, loggers))
    return loggers


def _close(loggers: RunLoggers, kind: type[BaseException] | None, *_: Any) -> None:
    """Close the W&B run, as failed if an exception ends the run."""
    loggers.wandb.finish(failed=kind is not None)


def make_tools(
    inputs: Inputs, out: Path, ranks: Ranks, loggers: RunLoggers | None, base: Model, base_key: str
) -> Tools:
    """Return the objects that the stages of a run work with."""
    settings, fabric, data = inputs.settings, inputs.fabric, inputs.settings.data
    supplied = inputs.supplied
    tokenizer_folder = base.folder if supplied is None else supplied.served_folder(base.folder)
    encoder = Encoder(load_tokenizer(tokenizer_folder), settings.model.template, data.max_length, data.tokenization)
    ours = ("timeout_min", "shard", "activation_checkpointing")
    trainer_arguments = {name: value for name, value in asdict(settings.trainer).items() if name not in ours}
    safety_limit = settings.evaluate.max_new_tokens
    limits = {"harmful": safety_limit, "harmless": safety_limit, "task": settings.task.max_new_tokens}
    options = settings.evaluate
    decoding = _build_decoding(options, settings.seed)
    mesh = init_device_mesh(fabric.device.type, (fabric.world_size,)) if settings.trainer.shard else None
    origin = run_origin(settings, base_key, fabric) | (supplied.aligned_key if supplied else {})
    return Tools(
        StageCache(cache_folder(settings.cache_dir), origin, fabric, ranks, loggers),
        ModelSource(base, settings.model, supplied.aligned_folder if supplied else None, mesh),
        encoder,
        AdapterTrainer(
            encoder,
            trainer_arguments,
            out / "checkpoints",
            settings.checkpoint.every,
            loggers,
            settings.trainer.activation_checkpointing,
        ),
        Evaluator(fabric, encoder.tokenizer, inputs.prompting, limits, options.batch_size, decoding),
        out,
        tokenizer_folder,
    )


def _input_metrics(inputs: Inputs, base_key: str) -> Metrics:
    """Return the metrics that identify the inputs of a run: seed, hashes, threads, and overlaps of the rows."""
    overlap = inputs.rows.overlap
    # Besides config and package: the base model, the rows, and the code of user-defined classes.
    instances = {**inputs.defenses.by_group, "task": inputs.task}
    if type(inputs.attack) is not Attack:
        instances["attack"] = inputs.attack
    user_code = {name: user_code_hash(instance) for name, instance in instances.items()}
    adapter = inputs.supplied.contents if inputs.supplied else []
    prompts = _describe_prompts(inputs)
    return {
        **({"prompts": prompts} if prompts else {}),
        **({"variants": [*inputs.variants]} if inputs.variants else {}),
        **({"engine": inputs.engine.title} if inputs.engine.title else {}),
        "seed": inputs.settings.seed,
        "code": package_hash(),
        "inputs": short_hash([base_key, content_hashes(inputs.settings.source), user_code, *adapter]),
        **({"adapter": short_hash(adapter)} if adapter else {}),
        "threads": torch.get_num_threads(),
        "rows/overlap": sum(overlap.values()),
        **{f"rows/overlap/{pair}": count for pair, count in overlap.items()},
    }


def _describe_prompts(inputs: Inputs) -> str:
    """Return how the prompts of the evaluation differ from those of training; "" if they do not."""
    method, prompting = inputs.defenses.method, inputs.prompting
    is_undefended = method is not None and method.trigger is not None and not prompting.trigger
    undefended = "no trigger (undefended)" if is_undefended else ""
    decoding = _build_decoding(inputs.settings.evaluate, inputs.settings.seed)
    return ", ".join(filter(None, (prompting.summary, undefended, decoding.summary)))
