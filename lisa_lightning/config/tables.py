"""Tables of all config keys, generated from the settings classes. Start at `page`, the text of docs/configuration.md.

python -m lisa_lightning.config.tables > docs/configuration.md
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Final

from pydantic.dataclasses import is_pydantic_dataclass

from lisa_lightning.config.instances import class_sections, load_class
from lisa_lightning.config.parameters import composed, parameters, section_of, shown
from lisa_lightning.config.paths import CONF
from lisa_lightning.config.settings import SECTIONS, SETS, RowSet

GROUPS: Final = ("curate", "align", "method", "repair", "attack", "engine", "judge")
"""Config groups whose keys are the arguments of the chosen class."""
START: Final = """\
# Configuration

`python -m lisa_lightning.config.tables` generates this page from the settings classes and `conf/`.

- `KEY=VALUE` overrides a key, such as `optim.lr=1e-4`; `GROUP=NAME` chooses a file of `conf/GROUP/`.
- A default is the value in `conf/`. `???` has to be set; `${KEY}` is the value of another key.
- `lora=null` replaces section `lora`: fine-tuning then trains [all weights](running.md#full-parameter-fine-tuning).
- Where sections share a table, a section without a value takes over that of another.
- `conf/` documents keys without a table: those of `task`, `logger`, `callbacks` and `judge.linear.rows`.
- `filter=NAME` has the keys of `judge=NAME`, as `filter.NAME.KEY`.
"""

NAMED_SETS: Final = """\
In `harmful_prompts` and `harmless_prompts`, `source.SET.NAME.KEY` defines a [named set](evaluation.md#prompt-sets)."""


def page() -> str:
    """Return the text of docs/configuration.md."""
    lines = [START, "## Sections", "", *_sections()]
    for group in GROUPS:
        lines += [f"## `{group}`", "", *_choices(group)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _sections() -> Iterator[str]:
    """Yield one table per settings class."""
    configs = (composed("repair=nlsr"), composed("model=tiny"))
    for kind in dict.fromkeys(SECTIONS.values()):
        if kind is RowSet:
            yield from ["### `source.SET`", "", f"SET is {', '.join(SETS)}. {NAMED_SETS}", ""]
            yield from _table(kind, {"source.SET": asdict(RowSet())})
            continue
        names = [name for name in SECTIONS if SECTIONS[name] is kind]
        sections = {name: next(filter(None, (section_of(config, name) for config in configs))) for name in names}
        yield "### " + ", ".join(f"`{name}`" if name else "Keys outside sections" for name in names)
        yield ""
        yield from _table(kind, sections)


def _choices(group: str) -> Iterator[str]:
    """Yield one table per class of a config group."""
    for name in sorted(file.stem for file in (CONF / group).glob("[!_]*.yaml")):
        config = composed(f"{group}={name}")
        for key, section in class_sections(config):
            if key.partition(".")[0] != group:
                continue
            cls = load_class(section["_target_"], key)
            yield f"### `{group}={name}`" + (f": `{key}`" if key.startswith("repair.") else "")
            yield ""
            yield f"[{cls.__name__}](../{cls.__module__.replace('.', '/')}.py)"
            yield ""
            if is_pydantic_dataclass(cls):
                yield from _table(cls, {key: section})


def _table(kind: type[Any], sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table with a row for each parameter, nothing without parameters."""
    described = parameters(kind)
    if not described:
        return
    yield "| key | default | allowed | meaning |"
    yield "|---|---|---|---|"
    only = next(iter(sections)) if len(sections) == 1 else ""
    for parameter in described:
        key = f"{only}.{parameter.name}".removeprefix(".")
        cells = (f"`{key}`", _default(parameter.name, sections), parameter.allowed, parameter.meaning)
        yield f"| {' | '.join(map(_escaped, cells))} |"
    yield ""


def _default(name: str, sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the default of a key, followed by its section if several sections differ."""
    copies = {f"${{{section}.{name}}}" for section in sections}
    sections_of: dict[str, list[str]] = {}
    for section, values in sections.items():
        if (text := shown(values[name])) not in copies:
            sections_of.setdefault(text, []).append(section)
    if len(sections_of) == 1:
        return f"`{next(iter(sections_of))}`"
    return ", ".join(f"`{text}` ({', '.join(names)})" for text, names in sections_of.items())


def _escaped(cell: str) -> str:
    """Return a cell of a Markdown table. Code between backticks keeps its signs, but for the bar."""
    parts = re.split(r"(`[^`]*`)", cell.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    print(page(), end="")
