"""Parsing of a config into typed settings: `parse_settings`."""

from collections.abc import Mapping
from typing import Any, TypeVar, get_origin

from lisa_lightning.config.fields import section_class
from lisa_lightning.config.instances import parse
from lisa_lightning.config.prompt_sets import split_source
from lisa_lightning.config.settings import Reference, RunSettings

T = TypeVar("T")


def parse_settings(config: Mapping[str, Any]) -> RunSettings:
    """Return the settings of a run.

    Args:
        config: the nested config, resolved, which `config.validate.check` has accepted.

    Raises:
        UserError: if a value is not allowed.
    """
    reference = (config["repair"] or {}).get("reference")
    parsed = None if reference is None else _parse_section(Reference, _without_methods(reference), "repair.reference")
    return _parse_section(RunSettings, {**config, "reference": parsed, "source": split_source(config["source"])}, "")


def _without_methods(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Return section `repair.reference` with the optimizer settings of each phase directly under its name."""
    return {**reference, **{name: phase["optim"] for name, phase in reference.items() if isinstance(phase, Mapping)}}


def _parse_section(kind: type[T], section: Mapping[str, Any], key: str) -> T:
    """Return the settings of a section. Its other keys, which belong to classes, are ignored."""
    values = {}
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if name not in section:
            continue
        value, field_key, inner = section[name], f"{key}.{name}".removeprefix("."), section_class(field.annotation)
        if inner is None or not isinstance(value, Mapping):
            values[name] = value
        elif get_origin(field.annotation) is dict:
            values[name] = {n: _parse_section(inner, entry, f"{field_key}.{n}") for n, entry in value.items()}
        else:
            values[name] = _parse_section(inner, value, field_key)
    return parse(kind, values, key)
