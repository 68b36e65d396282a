"""Text of `python run.py --help`: examples, config groups with their options, and the keys of the default choices."""

import re
from collections.abc import Iterator
from textwrap import fill, wrap
from typing import Any, Final

from lisa_lightning.config.instances import load_class
from lisa_lightning.config.parameters import Parameter, composed, parameters, section_of, shown
from lisa_lightning.config.paths import COMMAND, CONF
from lisa_lightning.config.settings import SECTIONS

START: Final = """\
Align a language model, fine-tune it on partly harmful rows under a defense, and measure its remaining safety.

  python run.py experiment=sst2_lisa                      a run
  python run.py experiment=sst2_lisa method=sft seed=1    with other choices, GROUP=NAME, and values, KEY=VALUE
  python run.py -m experiment=sst2_lisa seed=1,2,3        a sweep
  python run.py ... hydra.run.dir=FOLDER resume=true      continue an interrupted run in FOLDER
  python run.py export RUN OUT                            merge a run's adapter into a model that loads anywhere
  python run.py ... --cfg job --resolve                   print every key and its value, without a run

Options of each config group (conf/GROUP/NAME.yaml), after its default
"""
KEYS: Final = "Keys of the default choices. docs/configuration.md has those of all choices."
SHARED: Final = re.compile(r"(align|repair\.reference\.\w+)\.(lora|optim)|source\.(?!train$)\w+")
"""Sections with the keys of another one."""
COMMENT_COLUMN: Final = 28
WIDTH: Final = 118


def usage() -> Iterator[str]:
    """Yield the lines of `--help`. The method's keys come last, because its class takes seconds to import."""
    config = composed()
    yield START.replace("python run.py", COMMAND)
    yield from _groups()
    yield f"{KEYS}\n"
    for name, kind in SECTIONS.items():
        if section_of(config, name) is not None and not SHARED.fullmatch(name):
            yield from _section(config, name, kind)
    yield from _section(config, "method", load_class(config["method"]["_target_"], "method"))


def _section(config: dict[str, Any], name: str, kind: type[Any]) -> Iterator[str]:
    """Yield the lines of a section as YAML with comments."""
    values = section_of(config, name) or {}
    indent = "  " if name else ""
    if name:
        yield f"{name}:"
    for parameter in parameters(kind):
        if parameter.name in values:
            yield from _key(parameter, f"{indent}{parameter.name}: {shown(values[parameter.name])}")
    yield ""


def _key(parameter: Parameter, line: str) -> Iterator[str]:
    comments = wrap(f"{parameter.meaning} Allowed: {parameter.allowed}.", WIDTH - COMMENT_COLUMN - 2)
    if len(line) >= COMMENT_COLUMN:
        yield line
        line = ""
    for comment in comments:
        yield f"{line:{COMMENT_COLUMN}}# {comment}"
        line = ""


def _groups() -> Iterator[str]:
    """Yield each config group with its default and options, in the order of the list of defaults."""
    defaults = (CONF / "config.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    groups = re.findall(r"^  - ([\w/]+): (\w+) +# (.+)$", defaults, re.MULTILINE)
    nested = [CONF / group for group, _, _ in groups if "/" in group]
    for group, default, meaning in groups:
        files = sorted((CONF / group).rglob("[!_]*.yaml"), key=lambda file: (len(file.parts), file))
        files = [file for file in files if "/" in group or file.parent not in nested]
        names = [file.relative_to(CONF / group).with_suffix("").as_posix() for file in files]
        yield f"  {group}={default}: {meaning}"
        yield fill(", ".join(names), WIDTH, initial_indent="      ", subsequent_indent="      ") + "\n"
