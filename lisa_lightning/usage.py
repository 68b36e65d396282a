"""What `python run.py --help` says: how it is called, what can be chosen, and the keys with their comments."""

from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

CONF = Path(__file__).parents[1] / "conf"
START = """\
Align a language model, fine-tune it on partly harmful rows under a defense, measure what is left of its safety.

  python run.py experiment=sst2_lisa                      a run
  python run.py experiment=sst2_lisa method=sft seed=1    of other choices, GROUP=NAME, and values, KEY=VALUE
  python run.py -m experiment=sst2_lisa seed=1,2,3        a sweep
  python run.py ... hydra.run.dir=FOLDER resume=true      goes on with what was interrupted in FOLDER
  python run.py ... --cfg job --resolve                   every key and its value, without a run

Groups and what can be chosen of each (conf/GROUP/NAME.yaml)
"""


def usage() -> str:
    """The text, for Hydra's template of `--help`."""
    keys = (CONF / "config.yaml").read_text(encoding="utf-8").partition("\n\n")[2].partition("\nhydra:")[0]
    text = "\n".join([START, *_groups(), "", "Keys beside those of the chosen files (conf/config.yaml)", "", keys])
    return text.replace("$", "$$")


def _groups() -> Iterator[str]:
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        files = sorted(folder.rglob("[!_]*.yaml"), key=lambda file: (len(file.parts), file))
        names = [file.relative_to(folder).with_suffix("").as_posix() for file in files]
        if folder.name != "paper":  # parts of experiment/paper, which no one chooses
            yield fill(", ".join(names), 118, initial_indent=f"  {folder.name:<12}", subsequent_indent=" " * 14)
