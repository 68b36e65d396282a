"""Rows of named prompt sets: their names, overlap and hashes, and the published sets."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from helpers.public_rows import public
from lisa_lightning.config.instances import build
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.validate import plain
from lisa_lightning.data.source import Rows, content_hashes, load_rows

PUBLISHED = {
    "advbench": ("advbench/harmful_behaviors.csv", "columns: {prompt: goal}", 520),
    "harmbench": (
        "harmbench/harmbench_behaviors_text_all.csv",
        "columns: {prompt: Behavior}, where: {FunctionalCategory: standard}",
        200,
    ),
    "do_not_answer": ("do_not_answer/prompts.csv", "columns: {prompt: question}", 939),
    "beavertails": ("beavertails_eval/BeaverTails-Evaluation.json", "skip: 0", 700),
}
"""Name of a set -> its file, the keys that read it, and its number of prompts."""


def load(cfg: DictConfig, allow_overlap: bool = False) -> Rows:
    config = plain(cfg)
    return load_rows(parse_settings(config).source, build(config["task"], "task"), allow_overlap)


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def test_prompts_keep_their_set_and_are_in_no_training_row(config: Callable[..., DictConfig], tmp_path: Path) -> None:
    (stolen, *_), pairs = load(config()).harmful, load(config()).alignment
    one = write(tmp_path / "one.jsonl", "a", "A", "b")
    two = write(tmp_path / "two.jsonl", stolen.instruction.upper(), "a")
    three = write(tmp_path / "three.jsonl", pairs[3].instruction)
    words = [f"+source.harmful_prompts={{one: {{path: {one}}}, two: {{path: {two}}}}}"]
    words += [f"+source.harmless_prompts.three.path={three}"]
    rows = load(config(*words))
    assert rows.harmful_prompts == {"one": ["a", "A", "b"], "two": [stolen.instruction.upper(), "a"]}
    assert rows.harmless_prompts == {"three": [pairs[3].instruction]}
    assert rows.overlap["harmful_harmful_prompts"] == 1
    assert rows.overlap["alignment_harmless_prompts"] == 1
    assert stolen not in rows.harmful
    assert pairs[3] not in rows.alignment
    assert stolen in load(config(*words), allow_overlap=True).harmful
    source = parse_settings(plain(config(*words))).source
    hashes = content_hashes(source)
    assert {"harmful_prompts.one", "harmful_prompts.two", "harmless_prompts.three"} <= hashes.keys()
    assert hashes["harmful"] == content_hashes({"harmful": config().source.harmful})["harmful"]
    write(two, "c")
    changed = content_hashes(source)
    assert {name for name in hashes if hashes[name] != changed[name]} == {"harmful_prompts.two"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_set_is_read_from_its_file(config: Callable[..., DictConfig], name: str) -> None:
    """A file takes the place of the hub's set. Its columns differ from the hub's."""
    path, keys, count = PUBLISHED[name]
    named = f"+source.harmful_prompts.{name}={{path: {public(path)}, {keys}, take: null}}"
    rows = load(config(f"source/harmful_prompts={name}", named), allow_overlap=True)
    assert {name: len(prompts) for name, prompts in rows.harmful_prompts.items()} == {name: count}


def test_the_safe_prompts_of_xstest_are_read(config: Callable[..., DictConfig]) -> None:
    file = public("xstest/xstest_prompts.csv")
    rows = load(config("source/harmless_prompts=xstest", f"source.harmless_prompts.xstest.path={file}"))
    assert len(rows.harmless_prompts["xstest"]) == 250
