"""One-sentence messages for errors of the user, in place of a traceback. Start at `explain`."""

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from lisa_lightning.config.suggest import suggest
from lisa_lightning.config.validate import TRAINER_ALTERNATIVES, trainer_alternative
from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import disk_error


def explain(error: Exception) -> str | None:
    """Return the message for an error of the user; None for an error of this package, which needs its traceback."""
    message = _message(error)
    return None if message is None else printable(message)


def _message(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    is_disk_error = disk_error(error) is not None
    if (reason := _system_error(error)) is not None:
        path = getattr(error, "filename", None) or "A file"
        return f"{path} can't be {'written' if is_disk_error else 'used'}: {reason}"
    from hydra.errors import HydraException, MissingConfigException

    if isinstance(error, MissingConfigException):
        return _unknown_option(error)
    cause = error.__cause__
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(cause)
    if isinstance(error, HydraException):
        message = first_line(error).partition(", set env var HYDRA_FULL_ERROR")[0].rstrip(":")
        if message.startswith("Ambiguous value"):
            message += "; for a sweep add -m, for a list write KEY=[A,B]"
        if multiple := re.match(r"Multiple values for (\w+)", message):
            message = f"+{multiple[1]}=...: the group has a choice already. Fix: leave out the +"
        return f"{message}: {first_line(_root_cause(cause))}" if cause else message
    if isinstance(error, OmegaConfBaseException):
        return first_line(error)
    if isinstance(error, YAMLError):
        return f"A config file is not valid YAML: {error}. Fix: correct the line"
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return f"{first_line(error)}. Fix: name an option of the group, GROUP=NAME, instead of null"
    return None


def _system_error(error: Exception) -> str | None:
    """Return why the system can't use a path; None for other errors."""
    reason = disk_error(error)
    if reason is None and isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror
    return reason


def _root_cause(error: BaseException) -> BaseException:
    """Return the first exception in a chain of causes."""
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def _unknown_option(error: Exception) -> str:
    """Return a message for Hydra's 'could not find GROUP/NAME' with similar names."""
    message = str(error)
    unknown = re.search(r"Could not (?:find|load) '([^']+)'", message)
    options = re.search(r"Available options(?: in '[^']+')?:\n((?:\t.+\n?)+)", message)
    if unknown is None:
        return first_line(error)
    group, _, name = unknown.group(1).rpartition("/")
    # Hydra lists no options for an entry of a list.
    names = options.group(1).split() if options else []
    names += [f.stem for folder in re.findall("path=file://(.+)", message) for f in Path(folder, group).glob("*.yaml")]
    names = sorted({option for option in names if not option.startswith("_")})
    return f"{group}={name} is not known; {suggest(name, names)}"


def _unknown_key(cause: ConfigKeyError | ConfigAttributeError) -> str:
    key = str(cause.full_key or cause.key)
    root = cause.parent_node
    while root is not None and root._get_parent() is not None:
        root = root._get_parent()
    if key.startswith("trainer.") and (name := key.removeprefix("trainer.")) in TRAINER_ALTERNATIVES:
        return f"{key}: {trainer_alternative(name)}"
    names = sorted(_config_keys(root)) if isinstance(root, DictConfig) else []
    group = key.rpartition(".")[0]
    if group == "lora" and isinstance(root, DictConfig) and OmegaConf.select(root, "lora", default="absent") is None:
        return f"{key}: lora=null, which trains all weights, has no keys. Fix: leave {key} or lora=null out"
    if group in ("method", "align.method", "repair", "curate", "attack"):
        # The keys of these sections are those of the chosen class.
        class_keys = [n for n in names if n.startswith(f"{group}.") and not n.endswith("_target_")]
        suggestion = suggest(key, class_keys) if class_keys else "it has none"
        return f"{key} is not a key of what was chosen as {group}; {suggestion}"
    return f"{key} is not a key of the config; {suggest(key, names)}"


def _config_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield every key of a config, sections included, with dots."""
    for name in cfg:
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_missing(cfg, name):
            child = cfg._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from _config_keys(child, f"{key}.")
