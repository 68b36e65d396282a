"""Validation of a config without heavy imports. Start at `check`."""

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

from lisa_lightning.config.default_stages import STAGES, TRAINING_STAGES
from lisa_lightning.config.instances import refuse_unknown_arguments
from lisa_lightning.config.prompt_sets import PROMPTS, check_prompt_sets, set_names
from lisa_lightning.config.rules import (
    LOCAL_SET_KEYS,
    RULES,
    SET_RULES,
    TRAINER_ALTERNATIVES,
    TRAINER_KEYS,
    not_allowed,
    quoted,
)
from lisa_lightning.config.settings import OPTIMS, SETS, VARIANT_KEYS
from lisa_lightning.config.suggest import suggest
from lisa_lightning.runtime.errors import UserError, printable

CLASS_MAPPINGS: Final = ("judge", "filter", "logger", "callbacks")
"""Sections that map names to classes. Several classes may be chosen."""
CLASS_SECTIONS: Final = ("attack", "method", "align.method", "curate", "repair", "engine", *CLASS_MAPPINGS)
"""Sections whose keys are the arguments of the chosen class. The module `instances` checks them."""
OPTIONAL_KEYS: Final = re.compile(rf"({'|'.join(map(re.escape, CLASS_SECTIONS))}|source|model\.tiny)\..*")
"""Keys with a rule that a config may omit."""
UNCHECKED_KEYS: Final = re.compile(
    rf"evaluate\.variants\..*|(source\.({'|'.join(SETS)})|judge\.linear\.rows)\.(columns|labels|where)\..*|align\.method|"
    r"task\.(_target_|question_suffix)|task\.embedded\.(train|test)|"
    r"task\.hub\.(id|config|revision|columns(\..*)?|(train|test)\.(id|split|files|rows))"
)
"""Keys without a rule: the user's columns, sets and arguments of a task, and `align.method` of align=none."""
REFERENCE_KEYS: Final = re.compile(r"repair\.reference\.(?!(sft|dpo)\.method\.)")
"""Settings of a reference adapter that are not arguments of a class."""
GROUPS_WITH_NONE: Final = ("align", "attack", "curate", "filter", "repair", "logger", "callbacks")
"""Config groups with an option `none`."""


def check(cfg: DictConfig) -> None:
    """Check every key and value of a config. Classes that it names are imported last.

    Raises:
        UserError: if a key is missing or unknown, or has a wrong value. The message has the key, the value, and the
            allowed values.
    """
    for key in _missing_keys(cfg):
        raise UserError(f"{key} has no value. Fix: set {key}=...")
    _check_sections(cfg)
    _check_trainer(cfg.trainer)
    for section, name in (("judge", "embedded"), ("logger", "csv"), ("callbacks", "learning_rate_monitor")):
        if not isinstance(value := _value(cfg, section), DictConfig | str):
            raise UserError(f"{section}={quoted(value)}: it must be a mapping of {section}s. Fix: {section}={name}")
    check_prompt_sets(plain(cfg.source))
    _refuse_unknown_keys(cfg)
    for key, (is_allowed, allowed) in RULES.items():
        value = _value(cfg, key)
        if value != "absent" and not is_allowed(value):
            raise not_allowed(key, value, allowed)
    _check_stage_classes(cfg)
    _check_combinations(cfg)
    refuse_unknown_arguments(plain(cfg))
    _check_engine(cfg)


def _value(cfg: DictConfig, key: str) -> Any:
    """Return the value of a key with dots, or "absent"."""
    return OmegaConf.select(cfg, key, default="absent")


def _missing_keys(cfg: DictConfig) -> list[str]:
    """Return the keys without a value. Next to named sets, a path is only a default, which may be missing."""
    defaults = {f"source.{name}.path" for name in PROMPTS if set_names(_value(cfg, f"source.{name}"))}
    return sorted(OmegaConf.missing_keys(cfg) - defaults)


def _check_sections(cfg: DictConfig) -> None:
    """Raise UserError if a required section or key was deleted, or a section is not a mapping."""
    _check_lora(cfg)
    required = [key for key in RULES if not OPTIONAL_KEYS.fullmatch(key)]
    if cfg.lora is None:
        required = [key for key in required if not key.startswith("lora.")]
    sections = {key.rpartition(".")[0] for key in required} | {"source", *GROUPS_WITH_NONE}
    for section in [*sorted(sections - {""}), *(f"source.{name}" for name in SETS)]:
        value = _value(cfg, section)
        if not isinstance(value, DictConfig):
            fix = f"{section}=none" if section in GROUPS_WITH_NONE else f"set its keys one by one: {section}.KEY=VALUE"
            start = f"{section} was deleted" if value == "absent" else f"{section}={quoted(value)} is not allowed"
            raise UserError(f"{start}; it must be a mapping. Fix: {fix}")
    for name in (name for name in SETS if not _is_named(cfg, name)):
        keys = SET_RULES if cfg.source[name].get("hub") is not None else LOCAL_SET_KEYS
        required += [f"source.{name}.{key}" for key in keys if key != "hub"]
    for key in required:
        if _value(cfg, key) == "absent":
            raise UserError(f"{key} was deleted, and every run needs it. Fix: leave out ~{key}")


def _check_lora(cfg: DictConfig) -> None:
    """Raise UserError if section `lora` is neither a mapping nor null, which trains all weights."""
    lora = _value(cfg, "lora")
    if lora is not None and not isinstance(lora, DictConfig):
        start = "lora was deleted" if lora == "absent" else f"lora={quoted(lora)} is not allowed"
        raise UserError(
            f"{start}; it must be a mapping, or null for full-parameter fine-tuning. Fix: lora.KEY=VALUE, or lora=null"
        )


def _is_named(cfg: DictConfig, name: str) -> bool:
    """Return whether a set of the source consists of named sets, which `prompt_sets` checks."""
    return name in PROMPTS and bool(set_names(cfg.source[name]))


def _refuse_unknown_keys(cfg: DictConfig) -> None:
    """Raise UserError for a key that nothing reads, such as a key added by `+`, and suggest similar keys."""
    config = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config, dict)
    references = {name for value in _strings(config) for name in re.findall(r"\$\{(?:oc\.select:)?([\w.]+)", value)}
    for key in _leaf_keys(config):
        if _is_read(cfg, key) or _is_referenced(key, references):
            continue
        group = next((section for section in CLASS_SECTIONS if key.startswith(f"{section}.")), "").partition(".")[0]
        if group in GROUPS_WITH_NONE and (not REFERENCE_KEYS.match(key) or key in RULES):
            reason = f"the chosen {group} does not read it" if _names_class(cfg[group]) else f"{group}=none has no keys"
            raise UserError(f"{key}: {reason}. Fix: choose another {group}, or leave the key out")
        keys = {*RULES, *_leaf_keys(config)} - {key}
        keys = {name for name in keys if not key.startswith(f"{name}.")}
        raise UserError(f"{key} is not a key of the config; {suggest(key, keys)}")


def _is_referenced(key: str, references: Set[str]) -> bool:
    """Return whether an interpolation reads this key, as in the config of a sweep."""
    return any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in references)


def _is_read(cfg: DictConfig, key: str) -> bool:
    """Return whether a run reads a key. Arguments of a class count as read; `instances` checks them."""
    if key in CLASS_SECTIONS or UNCHECKED_KEYS.fullmatch(key) or (key == "lora" and cfg.lora is None):
        return True
    if REFERENCE_KEYS.match(key):
        phase = "sft" if key.startswith("repair.reference.sft.") else "dpo"
        return key in RULES and _names_class(_value(cfg, f"repair.reference.{phase}.method"))
    section = next((name for name in CLASS_SECTIONS if key.startswith(f"{name}.")), None)
    if section in CLASS_MAPPINGS:
        section = ".".join(key.split(".")[:2])
    if section is not None:
        return _names_class(_value(cfg, section))
    section, _, set_key = key.removeprefix("source.").partition(".")
    if key.startswith("source.") and section in PROMPTS and set_key.partition(".")[0] not in SET_RULES:
        return _is_named(cfg, section)
    parent, _, name = key.rpartition(".")
    if parent.startswith("source.") and name not in LOCAL_SET_KEYS:
        return key in RULES and cfg.source[parent.removeprefix("source.")].get("hub") is not None
    return key in RULES


def _names_class(section: Any) -> bool:
    return isinstance(section, DictConfig | dict) and section.get("_target_") is not None


def _leaf_keys(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the key with dots of every value. An empty mapping counts as a value."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaf_keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _strings(tree: Any) -> Iterator[str]:
    """Yield every string of a nested config, with interpolations unresolved."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _strings(value)


def _check_stage_classes(cfg: DictConfig) -> None:
    """Raise UserError if a stage that runs has no class."""
    if not (_value(cfg, "align.method") is None or _names_class(_value(cfg, "align.method"))):
        raise UserError("align.method must be a mapping with _target_, or null. Fix: choose one by align=NAME, or none")
    for stage, group, fix in (
        ("finetune", "method", "method=sft"),
        ("evaluate", "engine", "engine=transformers"),
        ("judge", "judge", "judge=embedded"),
    ):
        section = _value(cfg, group)
        sections = section if group == "judge" else {"": section}
        is_set = isinstance(sections, DictConfig | dict) and sections and all(map(_names_class, sections.values()))
        if stage in cfg.stages and not is_set:
            raise UserError(f"{group}: the stage {stage} needs one, and none is chosen. Fix: {fix}, or another stages=")


def _check_combinations(cfg: DictConfig) -> None:
    """Raise UserError for values that contradict each other."""
    if cfg.responses is not None and list(cfg.stages) != ["judge"]:
        raise UserError(f"responses={cfg.responses} is judged by stages=[judge] alone; stages={quoted(cfg.stages)}")
    _check_adapter(cfg)
    if cfg.lora is None:
        _check_full_training(cfg)
    if "judge" in cfg.stages and "evaluate" not in cfg.stages and len(cfg.stages) > 1:
        raise UserError(f"stages={quoted(cfg.stages)}: judge needs evaluate's answers; alone it judges stored ones")
    if cfg.evaluate.gradient_rows and not cfg.evaluate.every:
        raise UserError(f"evaluate.gradient_rows={cfg.evaluate.gradient_rows} needs evaluate.every above 0")
    _refuse_equal_samples("evaluate", cfg.evaluate)
    _check_variants(cfg.evaluate)
    for optim in OPTIMS:
        steps, epochs = (_value(cfg, f"{optim}.{key}") for key in ("steps", "epochs"))
        if "absent" not in (steps, epochs) and (steps is None) == (epochs is None):
            raise UserError(f"{optim}.steps={steps} and {optim}.epochs={epochs}: one of them must be null, one not")
    for name in SETS:
        if (
            name != "defender"
            and not _is_named(cfg, name)
            and cfg.source[name].path is None
            and cfg.source[name].get("hub") is None
        ):
            raise not_allowed(f"source.{name}.path", None, "the path of a file")
    for method in ("method", "align.method"):
        steps = [OmegaConf.select(cfg, f"{method}.{key}") for key in ("alignment_steps", "user_steps")]
        if steps == [0, 0]:
            raise UserError(f"{method}.alignment_steps=0 and {method}.user_steps=0: one of them must be above 0")
    if cfg.model.tiny is not None and {"hidden_size", "layers", "heads"} - {*cfg.model.tiny}:
        raise UserError(f"model.tiny={quoted(cfg.model.tiny)} lacks a size. Fix: model=tiny, which has all of them")
    if cfg.model.tiny is not None and cfg.model.tiny.hidden_size % (2 * cfg.model.tiny.heads):
        sizes = ", ".join(f"model.tiny.{key}={cfg.model.tiny[key]}" for key in ("hidden_size", "heads"))
        raise UserError(f"{sizes}: the first must be a multiple of twice the second")


def _refuse_equal_samples(section: str, options: Mapping[Any, Any]) -> None:
    """Raise UserError if samples are drawn at temperature 0."""
    if not options["temperature"] and (options["samples"] > 1 or options["top_p"] < 1):
        key = "samples" if options["samples"] > 1 else "top_p"
        raise UserError(
            f"{section}.{key}={options[key]}: at {section}.temperature=0 all answers to a prompt are equal. "
            f"Fix: set {section}.temperature above 0, such as 0.7"
        )


def _check_variants(evaluate: Mapping[Any, Any]) -> None:
    """Raise UserError if a variant has a wrong name, key or value, or if two variants have no options."""
    variants = {} if evaluate["variants"] is None else plain(evaluate["variants"])
    for name, options in variants.items():
        section = f"evaluate.variants.{name}"
        if re.fullmatch(r"\w+", name) is None:
            raise UserError(f"{printable(section)}: it is no name. Fix: use letters, digits and underscores")
        if not isinstance(options, dict):
            raise not_allowed(section, options, f"a mapping with {', '.join(VARIANT_KEYS)}, or {{}}")
        for key, value in options.items():
            if key not in VARIANT_KEYS:
                raise UserError(f"{section}.{key} is no option of a variant; {suggest(key, VARIANT_KEYS)}")
            is_allowed, allowed = RULES[f"evaluate.{key}"]
            if not is_allowed(value):
                raise not_allowed(f"{section}.{key}", value, allowed)
        _refuse_equal_samples(section, {**evaluate, **options})
    if len(unchanged := [name for name, options in variants.items() if not options]) > 1:
        raise UserError(
            f"evaluate.variants: {' and '.join(unchanged)} have no options, so that they are the same. "
            "Fix: leave one of them out"
        )


def _check_adapter(cfg: DictConfig) -> None:
    """Raise UserError if keys contradict `adapter`, or `aligned` is set without it."""
    if cfg.aligned is not None and cfg.adapter is None:
        raise UserError(
            f"aligned={quoted(cfg.aligned)}: it is the aligned model of adapter=FOLDER, which is not set. "
            "Fix: set adapter=FOLDER, or leave aligned out"
        )
    if cfg.adapter is not None and (training := {*TRAINING_STAGES} & {*cfg.stages}):
        others = ",".join(stage for stage in cfg.stages if stage not in training) or "repair,evaluate,judge"
        raise UserError(
            f"stages={quoted(cfg.stages)}: adapter={quoted(cfg.adapter)} is trained already, so that "
            f"{' and '.join(stage for stage in STAGES if stage in training)} can't run. Fix: stages=[{others}], or "
            "leave adapter out"
        )


def _check_full_training(cfg: DictConfig) -> None:
    """Raise UserError if keys contradict `lora=null`."""
    if cfg.adapter is not None:
        raise UserError(
            f"lora=null: adapter={quoted(cfg.adapter)} is an adapter, and nothing is fine-tuned. Fix: leave lora out, "
            "or leave adapter out"
        )
    if "finetune" not in cfg.stages:
        return
    if cfg.model.quantize is not None:
        raise UserError(
            f"lora=null: weights that are quantized (model.quantize={cfg.model.quantize}) can't be trained. "
            "Fix: model.quantize=null, or leave lora out"
        )
    if cfg.model.adapters == "continued":
        raise UserError(
            "lora=null: model.adapters=continued trains the adapter of stage align further, and lora=null none. "
            "Fix: model.adapters=stacked, or leave lora out"
        )


def _check_engine(cfg: DictConfig) -> None:
    """Raise UserError for an engine that can't answer for the models of the run."""
    if "evaluate" not in cfg.stages:
        return
    is_started = _value(cfg, "engine.command") not in (None, "absent")
    if is_started and cfg.model.quantize is not None:
        raise UserError(
            f"model.quantize={cfg.model.quantize}: engine.command would serve merged weights without quantization, "
            "which is another model. Fix: engine=transformers, or model.quantize=null"
        )
    changes_model = "finetune" in cfg.stages or ("repair" in cfg.stages and _names_class(cfg.repair))
    if _value(cfg, "engine.base_url") not in (None, "absent") and not is_started and changes_model:
        names = [_value(cfg, f"engine.served.{model}") for model in ("aligned", "final")]
        if None in names or names[0] == names[1]:
            raise UserError(
                f"engine.served={quoted(cfg.engine.served)}: one model at engine.base_url would answer for both. "
                "Fix: set engine.served.aligned and engine.served.final to different names, or use engine.command"
            )


def _check_trainer(trainer: Any) -> None:
    for name, value in trainer.items():
        if name not in TRAINER_KEYS:
            raise UserError(f"trainer.{name}={value}: {trainer_alternative(str(name))}")


def trainer_alternative(name: str) -> str:
    """Return the end of an error message: the alternative to an argument that the section `trainer` lacks."""
    if name in TRAINER_ALTERNATIVES:
        return f"Lightning can't honour this under manual optimization; use {TRAINER_ALTERNATIVES[name]}"
    return f"this is none of the supported Trainer arguments: {', '.join(TRAINER_KEYS)}"


def plain(cfg: Any) -> dict[str, Any]:
    """Return a section of the config as a dictionary, resolved."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the key with dots and the value of every leaf of a nested mapping. Lists are leaves."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
