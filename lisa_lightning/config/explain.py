"""The sentence that a person is told of their own mistake, in place of a traceback."""

import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from lisa_lightning.config.suggest import nearest
from lisa_lightning.config.validate import INSTEAD, beyond_trainer
from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import disk_trouble


def explain(error: Exception) -> str | None:
    """Return the sentence for a person's mistake; None where it is ours and the traceback is wanted."""
    sentence = _sentence(error)
    return None if sentence is None else printable(sentence)


def _sentence(error: Exception) -> str | None:
    if isinstance(error, UserError):
        return str(error)
    full = disk_trouble(error) is not None
    if (reason := _system_trouble(error)) is not None:
        return f"{getattr(error, 'filename', None) or 'A file'} can't be {'written' if full else 'used'}: {reason}"
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
        return f"{message}: {first_line(_root(cause))}" if cause else message
    if isinstance(error, OmegaConfBaseException):
        return first_line(error)
    if isinstance(error, YAMLError):
        return f"A config file is no YAML: {error}. Fix: correct the line"
    if isinstance(error, ValueError) and str(error).startswith("Config group override"):
        return f"{first_line(error)}. Fix: name an option of the group, GROUP=NAME, where null was given"
    return None


def _system_trouble(error: Exception) -> str | None:
    """Return the system's words for a path that can't be used, None for other errors."""
    reason = disk_trouble(error)
    if reason is None and isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror
    return reason


def _root(error: BaseException) -> BaseException:
    """What an exception comes from in the end."""
    return error if error.__cause__ is None else _root(error.__cause__)


def _unknown_option(error: Exception) -> str:
    """Hydra's 'could not find GROUP/NAME' with the nearest names."""
    message = str(error)
    found = re.search(r"Could not (?:find|load) '([^']+)'", message)
    options = re.search(r"Available options(?: in '[^']+')?:\n((?:\t.+\n?)+)", message)
    if found is None:
        return first_line(error)
    group, _, name = found.group(1).rpartition("/")
    names = options.group(1).split() if options else []  # which Hydra leaves out of a list's
    names += [f.stem for where in re.findall("path=file://(.+)", message) for f in Path(where, group).glob("*.yaml")]
    names = sorted({option for option in names if not option.startswith("_")})
    return f"{group}={name} is not known; {nearest(name, names)}"


def _unknown_key(cause: ConfigKeyError | ConfigAttributeError) -> str:
    key = str(cause.full_key or cause.key)
    root = cause.parent_node
    while root is not None and root._get_parent() is not None:
        root = root._get_parent()
    if key.startswith("trainer.") and (name := key.removeprefix("trainer.")) in INSTEAD:
        return f"{key}: {beyond_trainer(name)}"
    names = sorted(_keys(root)) if isinstance(root, DictConfig) else []
    group = key.rpartition(".")[0]
    if group in ("method", "align.method", "repair", "curate"):  # whose keys are those of what is chosen
        own = [n for n in names if n.startswith(f"{group}.") and not n.endswith("_target_")]
        return f"{key} is not a key of what was chosen as {group}; " + (nearest(key, own) if own else "it has none")
    return f"{key} is not a key of the config; {nearest(key, names)}"


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in cfg:
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_missing(cfg, name):
            child = cfg._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from _keys(child, f"{key}.")
