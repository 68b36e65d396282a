"""What is wrong with a config, said before anything heavy is imported."""

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any, Final

from omegaconf import DictConfig, OmegaConf

from lisa_lightning.config.rules import INSTEAD, LOCAL_SET, OPTIMS, RULES, SET, SETS, TRAINER, not_allowed, quoted
from lisa_lightning.config.suggest import nearest
from lisa_lightning.runtime.errors import UserError

WITHOUT_RESULT = ("resume", "cache_dir", "wandb", "checkpoint")
"""Keys that may differ between a finished run and the one that is asked for."""
CHOSEN: Final = ("method", "align.method", "curate", "repair", "judge")
"""Sections whose keys are the arguments of the class that is chosen, which `instances` checks."""
OPTIONAL: Final = re.compile(rf"({'|'.join(map(re.escape, CHOSEN))}|source|model\.tiny)\..*")
"""Rules about keys that a config need not have."""
FREE: Final = re.compile(
    rf"(source\.({'|'.join(SETS)})|judge\.linear\.rows)\.(columns|labels|where)\..*|align\.method|"
    r"task\._target_|task\.embedded\.(train|test)|"
    r"task\.hub\.(id|config|revision|columns(\..*)?|(train|test)\.(id|split|files|rows))"
)
"""Keys without a rule: a person's own columns, the sets of a task, a method where nothing aligns."""
REFERENCE: Final = re.compile(r"repair\.reference\.(?!(sft|dpo)\.method\.)")
"""NLSR's settings that are arguments of no class."""
WITH_NONE: Final = ("align", "curate", "repair")
"""Config groups whose option `none` chooses nothing."""


def check(cfg: DictConfig) -> None:
    """Check every key and value of a config, without importing what it names.

    Raises:
        UserError: if a key is missing or unknown, or has a wrong value: the key, the value, and what is allowed.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key} has no value; give one as {key}=...")
    _check_sections(cfg)
    _check_trainer(cfg.trainer)
    if not isinstance(_value(cfg, "judge"), DictConfig | str):
        raise UserError(f"judge={quoted(cfg.judge)}: it must be a mapping of judges. Fix: judge=embedded")
    _refuse_unknown_keys(cfg)
    for key, (right, allowed) in RULES.items():
        value = _value(cfg, key)
        if value != "absent" and not right(value):
            raise not_allowed(key, value, allowed)
    _check_choices(cfg)
    _check_together(cfg)


def _value(cfg: DictConfig, key: str) -> Any:
    return OmegaConf.select(cfg, key, default="absent")


def _check_sections(cfg: DictConfig) -> None:
    """Raise UserError where a section or a key that every run needs was deleted, or a section is no mapping."""
    needed = [key for key in RULES if not OPTIONAL.fullmatch(key)]
    sections = {key.rpartition(".")[0] for key in needed} | {"source", *WITH_NONE}
    for section in [*sorted(sections - {""}), *(f"source.{name}" for name in SETS)]:
        value = _value(cfg, section)
        if not isinstance(value, DictConfig):
            fix = f"{section}=none" if section in WITH_NONE else f"set its keys one by one, as {section}.KEY=VALUE"
            was = f"{section} was deleted" if value == "absent" else f"{section}={quoted(value)} is not allowed"
            raise UserError(f"{was}; it must be a mapping. Fix: {fix}")
    for name in SETS:
        keys = SET if cfg.source[name].get("hub") is not None else LOCAL_SET
        needed += [f"source.{name}.{key}" for key in keys if key != "hub"]
    for key in needed:
        if _value(cfg, key) == "absent":
            raise UserError(f"{key} was deleted, and every run needs it. Fix: leave out ~{key}")


def _refuse_unknown_keys(cfg: DictConfig) -> None:
    """Raise UserError for a key that nothing reads, as one that `+` added, with the closest that is read."""
    config = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(config, dict)
    references = {name for text in _texts(config) for name in re.findall(r"\$\{(?:oc\.select:)?([\w.]+)", text)}
    for key in _leaves(config):
        if _is_read(cfg, key) or _is_referenced(key, references):
            continue
        group = next((section for section in CHOSEN if key.startswith(f"{section}.")), "").partition(".")[0]
        if group in WITH_NONE and (not REFERENCE.match(key) or key in RULES):
            choice = "what is chosen doesn't read it" if _names_class(cfg[group]) else f"{group}=none has no keys"
            raise UserError(f"{key}: {choice}. Fix: choose another {group}, or leave the key out")
        known = {*RULES, *_leaves(config)} - {key}
        known = {name for name in known if not key.startswith(f"{name}.")}
        raise UserError(f"{key} is not a key of the config; {nearest(key, known)}")


def _is_referenced(key: str, references: Set[str]) -> bool:
    """Return whether another key takes its value from this one, as those of a sweep do."""
    return any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for name in references)


def _is_read(cfg: DictConfig, key: str) -> bool:
    """Return whether a run reads a key: the arguments of a class are left to `instances`."""
    if key in CHOSEN or FREE.fullmatch(key):
        return True
    if REFERENCE.match(key):
        return key in RULES and _names_class(_value(cfg, "repair.reference.sft.method"))
    section = next((name for name in CHOSEN if key.startswith(f"{name}.")), None)
    if section == "judge":
        section = ".".join(key.split(".")[:2])
    if section is not None:
        return _names_class(_value(cfg, section))
    first, _, name = key.rpartition(".")
    if first.startswith("source.") and name not in LOCAL_SET:
        return key in RULES and cfg.source[first.removeprefix("source.")].get("hub") is not None
    return key in RULES


def _names_class(section: Any) -> bool:
    return isinstance(section, DictConfig | dict) and section.get("_target_") is not None


def _leaves(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the key, with dots, of every value; an empty mapping is one."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _texts(tree: Any) -> Iterator[str]:
    """Yield every text in a nested config, interpolations as they are written."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _texts(value)


def _check_choices(cfg: DictConfig) -> None:
    """Raise UserError where a stage lacks the class that it runs."""
    if not (_value(cfg, "align.method") is None or _names_class(_value(cfg, "align.method"))):
        raise UserError("align.method must be a mapping with _target_, or null. Fix: choose one by align=NAME, or none")
    for stage, group, fix in (("finetune", "method", "method=sft"), ("judge", "judge", "judge=embedded")):
        section = _value(cfg, group)
        sections = section if group == "judge" else {"": section}
        chosen = isinstance(sections, DictConfig | dict) and sections and all(map(_names_class, sections.values()))
        if stage in cfg.stages and not chosen:
            raise UserError(f"{group}: the stage {stage} needs one, and none is chosen. Fix: {fix}, or another stages=")


def _check_together(cfg: DictConfig) -> None:
    """Raise UserError for values that exclude each other."""
    if cfg.responses is not None and list(cfg.stages) != ["judge"]:
        raise UserError(f"responses={cfg.responses} is judged by stages=[judge] alone; stages={quoted(cfg.stages)}")
    if "judge" in cfg.stages and "evaluate" not in cfg.stages and len(cfg.stages) > 1:
        raise UserError(f"stages={quoted(cfg.stages)}: judge needs evaluate's answers; alone it judges stored ones")
    if cfg.evaluate.gradient_rows and not cfg.evaluate.every:
        raise UserError(f"evaluate.gradient_rows={cfg.evaluate.gradient_rows} needs evaluate.every above 0")
    for where in OPTIMS:
        steps, epochs = (_value(cfg, f"{where}.{key}") for key in ("steps", "epochs"))
        if "absent" not in (steps, epochs) and (steps is None) == (epochs is None):
            raise UserError(f"{where}.steps={steps} and {where}.epochs={epochs}: one of them must be null, one not")
    for name in SETS:
        if name != "defender" and cfg.source[name].path is None and cfg.source[name].get("hub") is None:
            raise not_allowed(f"source.{name}.path", None, "the path of a file")
    for where in ("method", "align.method"):
        steps = [OmegaConf.select(cfg, f"{where}.{key}") for key in ("alignment_steps", "user_steps")]
        if steps == [0, 0]:
            raise UserError(f"{where}.alignment_steps=0 and {where}.user_steps=0: one of them must be above 0")
    if cfg.model.tiny is not None and {"hidden_size", "layers", "heads"} - {*cfg.model.tiny}:
        raise UserError(f"model.tiny={quoted(cfg.model.tiny)} lacks a size. Fix: model=tiny, which has all of them")
    if cfg.model.tiny is not None and cfg.model.tiny.hidden_size % (2 * cfg.model.tiny.heads):
        sizes = ", ".join(f"model.tiny.{key}={cfg.model.tiny[key]}" for key in ("hidden_size", "heads"))
        raise UserError(f"{sizes}: the first must be a multiple of twice the second")


def _check_trainer(trainer: Any) -> None:
    for name, value in trainer.items():
        if name not in TRAINER:
            raise UserError(f"trainer.{name}={value}: {beyond_trainer(str(name))}")


def beyond_trainer(name: str) -> str:
    """What to use in place of an argument that Lightning's Trainer has and `trainer` doesn't."""
    if name in INSTEAD:
        return f"Lightning can't honour this under manual optimization; use {INSTEAD[name]}"
    return f"this is none of what a run takes of the Trainer's arguments: {', '.join(TRAINER)}"


def bookkeeping(key: str) -> bool:
    """Return whether a key changes nothing of a result."""
    return key == "trainer.timeout_min" or key.partition(".")[0].partition("/")[0] in ("hydra", *WITHOUT_RESULT)


def of_result(config: Mapping[Any, Any], also_free: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings, by key with dots, that determine a result.

    Args:
        also_free: sections that may differ too.
    """
    settings = {key: value for key, value in flat(config) if not bookkeeping(key)}
    return {key: value for key, value in settings.items() if key.partition(".")[0] not in also_free}


def plain(cfg: Any) -> dict[str, Any]:
    """A part of the config as a dictionary, everything in it resolved."""
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Key with dots and value of everything in a nested mapping; lists are values."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def refuse_other_run(there: Mapping[Any, Any], wanted: Mapping[Any, Any]) -> None:
    """Raise UserError naming the first few settings in which the run that left something here differs from this one."""
    old, new = dict(flat(there)), dict(flat(wanted))
    other = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if other:
        shown = "; ".join(f"{k}: {old.get(k)} there, {new.get(k)} here" for k in other[:3])
        raise UserError(
            f"What lies here is of another run ({shown}). Start anew: in another "
            "hydra.run.dir, or, where a sweep chose the folder, after deleting it."
        )
