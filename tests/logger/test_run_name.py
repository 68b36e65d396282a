"""Names of runs: they tell what a run does, whatever else the config holds."""

import re
from pathlib import Path

import pytest

from helpers.composing import composed
from lisa_lightning.config.validate import plain
from lisa_lightning.logger.wandb import wandb_init
from lisa_lightning.report.run_page import write_run_page

NAMES = {
    "": ("lisa", "lisa-p0.1-seed42", "sst2_lisa", "lisa sst2 smollm2_135m", "lisa on sst2"),
    "~experiment method=sft harmful_ratio=0 model=tiny": (
        *("sft", "sft-p0-seed42", "run", "sft sst2 tiny", "sft on sst2"),
    ),
    "curate=seal align=vaccine repair=antidote seed=1": (
        "seal-vaccine-lisa-antidote",
        "seal-vaccine-lisa-antidote-p0.1-seed1",
        "sst2_lisa",
        "seal vaccine lisa antidote sst2 smollm2_135m",
        "seal + vaccine + lisa + antidote on sst2",
    ),
    "attack=pure_bad filter=moderation method=sft": (
        *("sft-moderation_filter-pure_bad", "sft-moderation_filter-pure_bad-p1.0-seed42", "sst2_lisa"),
        *("sft moderation_filter pure_bad sst2 smollm2_135m", "sft + moderation_filter on sst2 under pure_bad"),
    ),
    "attack=jailbreak stages=[align,evaluate]": (
        *("align-jailbreak", "align-jailbreak-smollm2_135m-seed42", "align", "align jailbreak sst2 smollm2_135m"),
        "smollm2_135m aligned by sft under jailbreak",
    ),
    "align=none task=gsm8k model.id=org/Mine-1B wandb.group=g wandb.tags=[t]": (
        *("no_align-lisa", "no_align-lisa-p0.1-seed42", "g", "no_align lisa gsm8k Mine-1B t"),
        "no_align + lisa on gsm8k",
    ),
    "stages=[finetune,evaluate] curate=seal align=vaccine repair=antidote": (
        *("no_align-lisa", "no_align-lisa-p0.1-seed42", "sst2_lisa", "no_align lisa sst2 smollm2_135m"),
        "no_align + lisa on sst2",
    ),
    "stages=[evaluate,judge] model.id=runs/after/ align=vaccine": (
        *("evaluate", "evaluate-after-seed42", "evaluate", "evaluate sst2 after", "after as it is"),
    ),
    "stages=[align,evaluate] align=vaccine": (
        *("align-vaccine", "align-vaccine-smollm2_135m-seed42", "align", "align vaccine sst2 smollm2_135m"),
        "smollm2_135m aligned by vaccine",
    ),
    "stages=[align,evaluate]": (
        *("align", "align-smollm2_135m-seed42", "align", "align sst2 smollm2_135m", "smollm2_135m aligned by sft"),
    ),
}
"""Overrides -> job type, name, group and tags in W&B, the page's heading."""


def below_heading(folder: Path) -> str:
    """Return the facts below the page's heading."""
    return (folder / "report.html").read_text().partition('<dl class="facts">')[2].partition("</dl>")[0]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", NAMES)
def test_a_run_is_called_by_what_it_does(tmp_path: Path, overrides: str) -> None:
    request = composed(overrides.split(), tmp_path)
    cfg, choices = request.cfg, dict(request.choices)
    arguments = wandb_init(plain(cfg), choices)
    write_run_page(tmp_path, {}, [], [], [], choices, plain(cfg))
    heading = (tmp_path / "report.html").read_text().partition("<h1>")[2].partition("</h1>")[0]
    assert (
        arguments["job_type"],
        arguments["name"],
        arguments["group"],
        " ".join(arguments["tags"]),
        heading,
    ) == NAMES[overrides]
    assert ("harmful ratio" in below_heading(tmp_path)) == bool(re.search("-p[01]", arguments["name"]))


def test_long_names_are_cut_to_what_wandb_takes(tmp_path: Path) -> None:
    request = composed([f"model.id={'long' * 40}"], tmp_path)
    arguments = wandb_init(plain(request.cfg), dict(request.choices), name=f"job={'long' * 40},seed=7")
    assert max(map(len, arguments["tags"])) == 64
    assert len(arguments["name"]) == 128
    assert arguments["name"].startswith("job=long")
    assert arguments["name"].endswith("long,seed=7")
