"""The sentence that a person is told of their own mistake, in place of a traceback."""

import difflib
import re
from collections.abc import Iterator

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from lisa_lightning.config import INSTEAD, beyond_trainer
from lisa_lightning.disk import disk_trouble
from lisa_lightning.errors import UserError


def explain(error: Exception) -> str | None:
    """The sentence for a person's mistake; None where it is ours and the traceback is wanted."""
    if isinstance(error, UserError):
        return str(error)
    reason = disk_trouble(error)
    if reason is None and isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        reason = error.strerror
    if reason is not None:
        return f"{getattr(error, 'filename', None) or 'A file'} can't be written: {reason}"
    from hydra.errors import HydraException, MissingConfigException

    if isinstance(error, MissingConfigException):
        return _unknown_option(str(error))
    cause = error.__cause__
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(cause)
    if isinstance(error, HydraException):
        return str(error).splitlines()[0] + (f": {str(cause).splitlines()[0]}" if cause else "")
    if isinstance(error, OmegaConfBaseException):
        return str(error).splitlines()[0]
    return None


def _unknown_option(message: str) -> str:
    """Hydra's 'could not find GROUP/NAME' with the nearest names."""
    found = re.search(r"Could not find '([^']+)'", message)
    options = re.search(r"Available options in '[^']+':\n((?:\t.+\n?)+)", message)
    if found is None or options is None:
        return message.splitlines()[0]
    group, _, name = found.group(1).rpartition("/")
    names = options.group(1).split()
    return f"{group}={name} is not known; {_nearest(name, names)}"


def _unknown_key(cause: ConfigKeyError | ConfigAttributeError) -> str:
    key = str(cause.full_key or cause.key)
    root = cause.parent_node
    while root is not None and root._get_parent() is not None:
        root = root._get_parent()
    if key.startswith("trainer.") and (name := key.removeprefix("trainer.")) in INSTEAD:
        return f"{key}: {beyond_trainer(name)}"
    names = sorted(_keys(root)) if isinstance(root, DictConfig) else []
    return f"{key} is not a key of the config; {_nearest(key, names)}"


def _keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in cfg:
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_missing(cfg, name):
            child = cfg._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none():
                yield from _keys(child, f"{key}.")


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    last = name.rpartition(".")[2]
    near = near or [n for n in names if n.rpartition(".")[2] == last][:3]
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names)}"
