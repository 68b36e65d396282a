"""Parameters of settings classes in words, for `--help` and docs/configuration.md. Start at `parameters`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lisa_lightning.config.fields import describe, section_class
from lisa_lightning.config.paths import CONF


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key of a section, or an argument of a class."""

    name: str
    allowed: str
    """Allowed values in words."""
    meaning: str
    """Text below the field, on one line."""


def parameters(kind: type[Any]) -> list[Parameter]:
    """Return the parameters of a settings class in the order of its fields, without fields that are sections."""
    fields = {n: f for n, f in kind.__pydantic_fields__.items() if section_class(f.annotation) is None}
    return [Parameter(n, describe(f.annotation, f.metadata), _meaning(kind, n)) for n, f in fields.items()]


def _meaning(kind: type[Any], name: str) -> str:
    """Return the text below a field, as for a config. Pydantic loses it for an inherited field."""
    fields = (vars(base).get("__pydantic_fields__", {}).get(name) for base in kind.__mro__)
    texts = (field.description for field in fields if field is not None and field.description)
    return re.sub(r"\bNone\b", "null", " ".join(next(texts, "").split()))


def composed(*overrides: str) -> dict[str, Any]:
    """Return the nested config of some choices, with interpolations unresolved."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = OmegaConf.to_container(compose("config", list(overrides)), resolve=False)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def section_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any] | None:
    """Return a section of a nested config, the config itself for "", and None if there is no such section."""
    section: Any = config
    for name in filter(None, key.split(".")):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section if isinstance(section, Mapping) else None


def shown(value: Any) -> str:
    """Return a value as YAML on one line; of a longer text only that it is one."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {shown(entry)}' for name, entry in value.items())}}}"
    if isinstance(value, str) and "\n" in value.strip("\n"):
        return f"a text of {value.count(chr(10))} lines"
    return value.replace("\n", "\\n") if isinstance(value, str) else str(value)
