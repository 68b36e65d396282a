"""What `python run.py --help` says: how it is called, what can be chosen, and the keys with their comments."""

import re
from collections.abc import Iterator
from textwrap import fill

from lisa_lightning.config.paths import COMMAND, CONF

START = """\
Align a language model, fine-tune it on partly harmful rows under a defense, measure what is left of its safety.

  python run.py experiment=sst2_lisa                      a run
  python run.py experiment=sst2_lisa method=sft seed=1    of other choices, GROUP=NAME, and values, KEY=VALUE
  python run.py -m experiment=sst2_lisa seed=1,2,3        a sweep
  python run.py ... hydra.run.dir=FOLDER resume=true      goes on with what was interrupted in FOLDER
  python run.py export RUN OUT                            merges a run's adapter; OUT loads on any machine
  python run.py ... --cfg job --resolve                   every key and its value, without a run

What can be chosen, GROUP=NAME (conf/GROUP/NAME.yaml); first what is chosen where nothing is said
"""


def usage() -> str:
    """The text, for Hydra's template of `--help`."""
    defaults, _, keys = (CONF / "config.yaml").read_text(encoding="utf-8").partition("\n\n")
    keys = keys.partition("\nhydra:")[0]
    said = "Keys, of which the chosen files have more: conf/config.yaml, and conf/method/ for the default method's"
    text = "\n".join(
        [START.replace("python run.py", COMMAND), *_groups(defaults), said, "", keys, *_of_the_method(defaults), ""]
    )
    return text.replace("$", "$$")


def _of_the_method(defaults: str) -> Iterator[str]:
    """The keys of the method that is chosen where nothing is said."""
    name = defaults.partition("- method: ")[2].split()[0]
    folder = CONF / "method"
    shared = re.findall(r"^  - (_(?!self)\w+)", (folder / f"{name}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    yield f"method:                     # the keys of method={name}; each method has its own"
    for file in (*shared, name):
        lines = (folder / f"{file}.yaml").read_text(encoding="utf-8").splitlines()
        yield from (f"  {line.replace('  #', '#', 1)}" for line in lines if re.match("[a-z]\\w*: ", line))


def _groups(defaults: str) -> Iterator[str]:
    """Each group with what it is about, its default and what can be chosen, in the order of the list of defaults."""
    for group, default, about in re.findall(r"^  - (\w+): (\w+) +# (.+)$", defaults, re.MULTILINE):
        files = sorted((CONF / group).rglob("[!_]*.yaml"), key=lambda file: (len(file.parts), file))
        names = [file.relative_to(CONF / group).with_suffix("").as_posix() for file in files]
        yield f"  {group}={default}: {about}"
        yield fill(", ".join(names), 118, initial_indent="      ", subsequent_indent="      ") + "\n"
