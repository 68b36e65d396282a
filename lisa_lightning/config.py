"""What is wrong with a config, said before anything heavy is imported."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lisa_lightning.errors import UserError
from lisa_lightning.rules import ENDPOINT, INSTEAD, OPTIMS, PRIVATE, RULES, SETS, TRAINER

WITHOUT_RESULT = ("resume", "cache_dir", "wandb", "checkpoint")
"""Keys that may differ between a finished run and the one that is asked for."""


def check(cfg: DictConfig) -> None:
    """Refuse wrong values.

    Raises:
        UserError: the key, its value, and what is allowed.
    """
    for key in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{key} has no value; give one as {key}=...")
    for key, (right, allowed) in RULES.items():
        value = OmegaConf.select(cfg, key, default="absent")
        if value != "absent" and not right(value):
            raise _not_allowed(key, value, allowed)
    if cfg.responses is not None and list(cfg.stages) != ["judge"]:
        raise UserError(f"responses={cfg.responses} is judged by stages=[judge] alone; stages={_shown(cfg.stages)}")
    if "judge" in cfg.stages and "evaluate" not in cfg.stages and len(cfg.stages) > 1:
        raise UserError(f"stages={_shown(cfg.stages)}: judge needs evaluate's answers; alone it judges stored ones")
    if cfg.evaluate.gradient_rows and not cfg.evaluate.every:
        raise UserError(f"evaluate.gradient_rows={cfg.evaluate.gradient_rows} needs evaluate.every above 0")
    for where in OPTIMS:
        steps, epochs = (OmegaConf.select(cfg, f"{where}.{k}", default="absent") for k in ("steps", "epochs"))
        if "absent" not in (steps, epochs) and (steps is None) == (epochs is None):
            raise UserError(f"{where}.steps={steps} and {where}.epochs={epochs}: one of them must be null, one not")
    _check_trainer(cfg.trainer)
    for name in SETS:
        if name != "defender" and cfg.source[name].path is None and cfg.source[name].get("hub") is None:
            raise _not_allowed(f"source.{name}.path", None, "the path of a file")
    for where in ("method", "align.method"):
        steps = [OmegaConf.select(cfg, f"{where}.{k}") for k in ("alignment_steps", "user_steps")]
        if steps == [0, 0]:
            raise UserError(f"{where}.alignment_steps=0 and {where}.user_steps=0: one of them must be above 0")
    if cfg.model.tiny is not None and cfg.model.tiny.hidden_size % (2 * cfg.model.tiny.heads):
        sizes = ", ".join(f"model.tiny.{key}={cfg.model.tiny[key]}" for key in ("hidden_size", "heads"))
        raise UserError(f"{sizes}: the first must be a multiple of twice the second")


def refuse_passwords(arguments: Sequence[str]) -> None:
    """Refuse an address with a password on the command line, which Hydra would write into a sweep's folders.

    Raises:
        UserError: the key, the address without it, and what is allowed.
    """
    for key, _, value in (argument.partition("=") for argument in arguments):
        if key.endswith(".base_url") and set(value) & set(PRIVATE):
            raise _not_allowed(key, value, ENDPOINT["base_url"][1])


def _check_trainer(trainer: Any) -> None:
    for name, value in trainer.items():
        if name not in TRAINER and value is not None:
            raise UserError(f"trainer.{name}={value}: {beyond_trainer(str(name))}")


def beyond_trainer(name: str) -> str:
    """What to use in place of an argument that Lightning's Trainer has and `trainer` doesn't."""
    if name in INSTEAD:
        return f"Lightning can't honour this under manual optimization; use {INSTEAD[name]}"
    return f"this is none of what a run takes of the Trainer's arguments: {', '.join(TRAINER)}"


def _not_allowed(key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{key}={_shown(value)} is not allowed; it must be {allowed}")


def _shown(value: Any) -> str:
    """As a message quotes it: without what may be the password, the query or the fragment of an address."""
    text = str(OmegaConf.to_container(value)) if isinstance(value, ListConfig | DictConfig) else str(value)
    text = re.sub(r"(\w+://)\S*(?=@)|\S*:\S*(?=@)", r"\1...", text)
    return re.sub(r"(?<=[?#])\S+", "...", text) if "://" in text else text


def bookkeeping(key: str) -> bool:
    """Whether a key changes nothing of a result."""
    return key.partition(".")[0].partition("/")[0] in ("hydra", *WITHOUT_RESULT)


def plain(cfg: Any) -> dict[str, Any]:
    """A part of the config as a dictionary, everything in it resolved."""
    found = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(found, dict)
    return {str(k): v for k, v in found.items()}


def saved(folder: Path) -> dict[str, Any] | None:
    """The config that a run left in its folder; None where there is none."""
    path = folder / "config.yaml"
    return plain(OmegaConf.load(path)) if path.exists() else None


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
