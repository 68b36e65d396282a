"""Classes that a config names by `_target_`. Start at `refuse_unknown_arguments`, which checks them, and `build`."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any, Final, TypeVar

from pydantic import ValidationError
from pydantic.dataclasses import is_pydantic_dataclass

from lisa_lightning.config.fields import describe, field_checks
from lisa_lightning.config.rules import not_allowed
from lisa_lightning.config.suggest import suggest
from lisa_lightning.runtime.errors import UserError, first_line, printable

T = TypeVar("T")
INTERFACES: Final = {
    "judge": ("metric", "verdicts"),
    "engine": ("title", "key", "answers"),
    "task": ("fields", "optional", "row"),
    "curate": ("scores", "selected_rows"),
    "repair": ("repair",),
    "align": ("gradient", "plan"),
    "method": ("gradient", "plan"),
    "logger": ("log_metrics", "finalize"),
    "attack": ("check", "rows"),
    "filter": ("metric", "verdicts"),
    "callbacks": ("on_train_start", "on_train_batch_end"),
}
"""Config group -> attributes that its classes must have, custom ones included."""
KEYED: Final = ("curate", "align", "method", "repair", "attack")
"""Config groups whose classes are dataclasses of settings, which are a part of cache keys."""
NO_ARGUMENTS: Final = {"repair": ("reference",), "task": ("max_new_tokens", "embedded", "hub")}
"""Config group -> keys of its section that are not arguments of its class."""
STAGE_ARGUMENTS: Final = {"logger": ("save_dir",)}
"""Config group -> required arguments that the stages set."""


def build(section: Mapping[str, Any], key: str) -> Any:
    """Return an instance of the class that a section names.

    Args:
        section: `_target_`, and the arguments of the class.
        key: key of the section.

    Raises:
        UserError: if the class does not exist; an argument is unknown, missing, or has a wrong value.
    """
    cls = load_class(section["_target_"], key)
    _refuse_other_arguments(cls, section, key)
    excluded = {"_target_", *NO_ARGUMENTS.get(key, ())}
    return parse(cls, {name: value for name, value in section.items() if name not in excluded}, key)


def parse(cls: type[T], values: Mapping[str, Any], key: str) -> T:
    """Return an instance of a class, created from values of the config.

    Args:
        cls: a settings class, or any other class.
        values: arguments by name.
        key: section of the config that the values come from.

    Raises:
        UserError: if a value is not allowed.
    """
    try:
        return cls(**values)
    except ValidationError as error:
        raise _value_error(cls, error, values, key) from error


def _value_error(cls: type[Any], error: ValidationError, values: Mapping[str, Any], key: str) -> UserError:
    details = error.errors()[0]
    if not details["loc"]:
        return UserError(f"{key}: {details['ctx']['error']}" if "ctx" in details else f"{key}: {details['msg']}")
    name = str(details["loc"][0])
    field = cls.__pydantic_fields__[name]
    return not_allowed(f"{key}.{name}", values[name], describe(field.annotation, field.metadata))


def refuse_unknown_arguments(config: Mapping[str, Any]) -> None:
    """Check every class that a config names, with the keys and values next to its `_target_`.

    Args:
        config: the nested config, resolved.

    Raises:
        UserError: if a class does not exist; an argument is unknown, missing, or has a wrong value. Similar names are
            suggested for an unknown one.
    """
    for key, section in class_sections(config):
        cls = load_class(section["_target_"], key)
        _refuse_other_arguments(cls, section, key)
        if _group(key) in ("judge", "filter", "engine"):
            _refuse_wrong_values(cls, section, key)
        elif is_pydantic_dataclass(cls):
            build(section, key)


def _refuse_wrong_values(cls: type[Any], section: Mapping[str, Any], key: str) -> None:
    """Raise UserError for a wrong value of a class that is not created: it would look for weights, keys or programs."""
    checks = field_checks(cls) if is_pydantic_dataclass(cls) else {}
    for name, (is_allowed, allowed) in checks.items():
        if not is_allowed(section[name]):
            raise not_allowed(f"{key}.{name}", section[name], allowed)


def _refuse_other_arguments(cls: type[Any], section: Mapping[str, Any], key: str) -> None:
    """Raise UserError for a key that is not an argument, or for a missing argument."""
    parameters = inspect.signature(cls).parameters.values()
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    unknown = {str(name) for name in section} - accepted - {"_target_", *NO_ARGUMENTS.get(key, ())}
    if unknown and not takes_any:
        raise UserError(f"{key}.{min(unknown)} is not a key of {cls.__name__}; {suggest(min(unknown), accepted)}")
    provided = {*section, *STAGE_ARGUMENTS.get(key.partition(".")[0], ())}
    # The saved config must show every setting of this package's classes, even those with defaults.
    is_setting = is_pydantic_dataclass(cls) and cls.__module__.startswith("lisa_lightning.")
    missing = [p.name for p in parameters if (is_setting or p.default is p.empty) and p.name in accepted - provided]
    if missing:
        raise UserError(f"{key}.{missing[0]} is missing. Fix: add +{key}.{missing[0]}=..., or don't delete it")


def class_sections(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield the key and the content of every section that names a class.

    Args:
        tree: the nested config.
        prefix: beginning of each key, with a dot at its end.
    """
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if "_target_" in value:
                yield f"{prefix}{name}", value
            yield from class_sections(value, f"{prefix}{name}.")


def load_class(target: Any, key: str) -> type[Any]:
    """Return the class that a section names.

    Args:
        target: value of `_target_`, MODULE.CLASS.
        key: key of the section.

    Raises:
        UserError: if the class does not exist, or lacks an attribute that its config group requires.
    """
    setting = f"{key}._target_={printable(str(target))[:120]}"
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module:
        raise UserError(f"{setting} is not a class. Fix: write MODULE.CLASS, as lisa_lightning.method.lisa.Lisa")
    try:
        cls = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            # The module exists, but a module that it imports does not.
            raise UserError(f"{setting} can't be imported: {first_line(error)}. Fix: install its imports") from error
        raise UserError(f"{setting}: {first_line(error)}. Fix: correct the name, or install the package") from error
    except (AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{setting}: {module} has no {name}. Fix: correct the name of the class") from error
    missing = [member for member in INTERFACES.get(_group(key), ()) if not hasattr(cls, member)]
    if not isinstance(cls, type) or missing:
        problem = f"lacks {', '.join(missing)}" if isinstance(cls, type) else "is not a class"
        fix = f"name a class of the config group {_group(key)} (docs/architecture.md)"
        raise UserError(f"{setting} {problem}. Fix: {fix}")
    if _group(key) in KEYED and not is_dataclass(cls):
        # Its fields are a part of the cache key.
        raise UserError(f"{setting} is no dataclass. Fix: decorate the class with @dataclass(frozen=True)")
    return cls


def _group(key: str) -> str:
    """Return the config group of a section. A reference adapter is trained by alignment methods."""
    return "align" if key.startswith("repair.reference.") else key.partition(".")[0]
