"""Classes that a config names by `_target_`: checked against their signatures, then called."""

import inspect
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Final

from lisa_lightning.config.rules import RULES
from lisa_lightning.config.suggest import nearest
from lisa_lightning.runtime.errors import UserError, first_line, printable

INTERFACES: Final = {
    "judge": ("metric", "verdicts"),
    "task": ("fields", "optional", "row"),
    "curate": ("scores", "kept"),
    "repair": ("repair",),
    "align": ("gradient", "draws"),
    "method": ("gradient", "draws"),
}
"""Config group -> what its classes have, whoever wrote them."""
NO_ARGUMENTS: Final = {"repair": ("reference",)}
"""Config group -> keys of its section that are not its class's arguments."""


def refuse_unknown_arguments(config: Mapping[str, Any]) -> None:
    """Check every class that a config names, and the keys next to its `_target_`.

    Args:
        config: nested, with everything resolved.

    Raises:
        UserError: if there is no such class; a key is none of its arguments, with the closest; an argument is missing.
    """
    for key, section in _sections(config):
        kind = load_class(section["_target_"], key)
        if key == "task":
            # A task is called without arguments; its other keys belong to stages and sources.
            continue
        parameters = inspect.signature(kind).parameters.values()
        accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        # Judges behind an endpoint hand the keys that they share on to it; RULES knows them.
        shared = {rule.removeprefix(f"{key}.") for rule in RULES if rule.startswith(f"{key}.")}
        passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
        known = accepted | shared if passes_on else accepted
        extra = {str(name) for name in section} - known - {"_target_", *NO_ARGUMENTS.get(key, ())}
        if extra and (shared or not passes_on):
            raise UserError(f"{key}.{min(extra)} is not a key of {kind.__name__}; {nearest(min(extra), known)}")
        missing = [p.name for p in parameters if p.default is p.empty and p.name in accepted - set(section)]
        if missing:
            raise UserError(
                f"{key}.{missing[0]} is missing. Fix: give it as +{key}.{missing[0]}=..., or don't delete it"
            )


def _sections(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield key and content of every section that names a class."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            if "_target_" in value:
                yield f"{prefix}{name}", value
            yield from _sections(value, f"{prefix}{name}.")


def load_class(target: Any, key: str) -> type[Any]:
    """Return the class that `_target_` of the section `key` names.

    Raises:
        UserError: if there is no such class, or it lacks what classes of its config group have.
    """
    at = f"{key}._target_={printable(str(target))[:120]}"
    module, _, name = target.rpartition(".") if isinstance(target, str) else ("", "", "")
    if not module:
        raise UserError(f"{at} is no class. Fix: write MODULE.CLASS, as lisa_lightning.method.lisa.Lisa")
    try:
        kind = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            # The module exists and imports something that doesn't.
            raise UserError(f"{at} can't be imported: {first_line(error)}. Fix: install what it imports") from error
        raise UserError(f"{at}: {first_line(error)}. Fix: correct the name, or install the package") from error
    except (AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{at}: {module} has no {name}. Fix: correct the name of the class") from error
    lacking = [member for member in INTERFACES.get(_group(key), ()) if not hasattr(kind, member)]
    if not isinstance(kind, type) or lacking:
        what = f"lacks {', '.join(lacking)}" if isinstance(kind, type) else "is no class"
        raise UserError(f"{at} {what}. Fix: name a class of the config group {_group(key)} (docs/architecture.md)")
    return kind


def _group(key: str) -> str:
    """Return the config group of a section: NLSR's reference is trained by methods, as aligning is."""
    return "align" if key.startswith("repair.reference.") else key.partition(".")[0]
