"""Named prompt sets in the config: what they inherit, the known ones, and errors before a model loads."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig

from helpers.composing import composed
from helpers.paths import CONF
from lisa_lightning.config.explain import explain
from lisa_lightning.config.parse import parse_settings
from lisa_lightning.config.prompt_sets import ORIGIN_KEYS, PROMPTS, split_source
from lisa_lightning.config.settings import RowSet
from lisa_lightning.config.validate import plain

Config = Callable[..., DictConfig]
KEYS = [field.name for field in fields(RowSet)]
KNOWN = {name: sorted(file.stem for file in (CONF / "source" / name).glob("*.yaml")) for name in PROMPTS}
FILES = [f"source.{name}.path=rows.jsonl" for name in ("train", "test", "alignment", "harmful")]


def sets(cfg: DictConfig) -> dict[str, RowSet]:
    """Return the parsed prompt sets of a config."""
    source = parse_settings(plain(cfg)).source
    return {key: entry for key, entry in source.items() if key.partition(".")[0] in PROMPTS}


def accepted(tmp_path: Path, *words: str) -> dict[str, RowSet]:
    """Return the parsed prompt sets of a command."""
    return sets(composed(words, tmp_path / "out").cfg)


@given(
    st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9)),
    st.dictionaries(
        st.sampled_from(["advbench", "mine", "a-b"]), st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9))
    ),
)
def test_a_named_set_inherits_what_it_does_not_set(shared: dict[str, Any], named: dict[str, dict[str, Any]]) -> None:
    """A set has its own keys, and inherits the others. Another file or data set inherits nothing that identifies it."""
    split = split_source({"train": shared, "harmful_prompts": shared | named})
    assert split.pop("train") == shared
    if not named:
        assert split == {"harmful_prompts": shared}
        return
    assert split.keys() == {f"harmful_prompts.{name}" for name in named}
    for name, named_set in named.items():
        excluded = ORIGIN_KEYS if {"path", "hub"} & named_set.keys() else ()
        assert split[f"harmful_prompts.{name}"] == {k: v for k, v in shared.items() if k not in excluded} | named_set


def test_other_sets_have_no_names() -> None:
    assert split_source({"train": {"mine": {"path": "a"}}}) == {"train": {"mine": {"path": "a"}}}


@pytest.mark.parametrize("source", ["embedded", "hub", "local"])
def test_sets_are_named_on_the_command_line(tmp_path: Path, source: str) -> None:
    """The defaults of a source next to the names, such as its own path or `???`, are no further set."""
    named = "source.harmful_prompts={adv-bench: {path: a.csv, columns: {prompt: goal}}, 2: {path: b.jsonl, take: 5}}"
    words = [f"source={source}", *(FILES if source == "local" else []), named, "source.harmful_prompts.more.path=c.tsv"]
    prompt_sets = accepted(tmp_path, *words, "source.harmless_prompts.xstest={path: d.csv, where: {label: safe}}")
    take = 1000 if source == "hub" else None
    assert prompt_sets == {
        "harmful_prompts.adv-bench": RowSet(path="a.csv", columns={"prompt": "goal"}, take=take),
        "harmful_prompts.2": RowSet(path="b.jsonl", take=5),
        "harmful_prompts.more": RowSet(path="c.tsv", take=take),
        "harmless_prompts.xstest": RowSet(path="d.csv", where={"label": "safe"}),
    }


def test_parts_of_one_file_are_named(tmp_path: Path) -> None:
    words = ["source.harmful_prompts.path=all.csv", "source.harmful_prompts.first.take=9"]
    prompt_sets = accepted(tmp_path, *words, "source.harmful_prompts.fraud.where={category: fraud}")
    assert prompt_sets["harmful_prompts.first"] == RowSet(path="all.csv", take=9)
    assert prompt_sets["harmful_prompts.fraud"] == RowSet(path="all.csv", where={"category": "fraud"})


@pytest.mark.slow
@pytest.mark.parametrize("source", ["embedded", "hub", "local"])
def test_known_sets_are_chosen_by_name(tmp_path: Path, source: str) -> None:
    chosen = [f"source/{name}=[{','.join(known)}]" for name, known in KNOWN.items()]
    more = ["source.harmful_prompts.take=7", "source.harmful_prompts.advbench.path=a.csv"]
    prompt_sets = accepted(tmp_path, f"source={source}", *(FILES if source == "local" else []), *chosen, *more)
    assert prompt_sets.keys() == {f"{section}.{name}" for section, known in KNOWN.items() for name in known}
    assert all(entry.hub and entry.split for entry in prompt_sets.values())
    assert (prompt_sets["harmful_prompts.advbench"].path, prompt_sets["harmful_prompts.advbench"].take) == ("a.csv", 7)
    assert (prompt_sets["harmful_prompts.strongreject"].path, prompt_sets["harmful_prompts.strongreject"].take) == (
        None,
        7,
    )
    assert prompt_sets["harmful_prompts.beavertails"].take == 1000


def test_a_single_set_has_no_name(tmp_path: Path) -> None:
    prompt_sets = accepted(tmp_path, "source.harmful_prompts.take=7")
    assert prompt_sets.keys() == {"harmful_prompts", "harmless_prompts"}
    assert prompt_sets["harmful_prompts"] == RowSet(path="embedded:harmful_prompts.jsonl[:150]", take=7)


SECTION = "source.harmful_prompts"
REFUSED = {
    "={mine: {}}": f"{SECTION}.mine={{}}: the set is empty. Fix: {SECTION}.mine.path=FILE",
    "={a b: {path: c}}": f"{SECTION}: 'a b' can't be the name of a set. Fix: use letters, digits",
    "={mine: rows.csv}": f"{SECTION}.mine=rows.csv: this is not a key of a set",
    ".mine.path=3": f"{SECTION}.mine.path=3 is not allowed; it must be the path of a file, or null",
    ".mine={path: a.csv, take: 0}": f"{SECTION}.mine.take=0 is not allowed; it must be a whole number above 0",
    ".mine={path: a.csv, colums: {prompt: goal}}": f"{SECTION}.mine.colums is not a key of a set, and mine is read as",
    ".mine={path: a.csv, rows: 3}": f"{SECTION}.mine.rows: only a hub data set has this key. Fix: set",
    ".mine={path: ???}": f"{SECTION}.mine.path has no value",
}


@pytest.mark.slow
@pytest.mark.parametrize("words", REFUSED)
def test_wrong_sets_are_refused_before_the_model_loads(tmp_path: Path, words: str) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011  # Hydra has errors of its own
        composed([f"{SECTION}{words}"], tmp_path)
    assert REFUSED[words] in str(explain(error.value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((f"+{SECTION}.tke=1",), "(did you mean take?), and a named set must be a mapping"),
        ((f"{SECTION}.tke=1",), f"{SECTION}.tke is not a key of the config; did you mean {SECTION}.take"),
        (("source/harmful_prompts=[advbnch]",), "source/harmful_prompts=advbnch is not known; did you mean advbench"),
        (("source=local", *FILES, f"{SECTION}.mine.take=3"), f"{SECTION}.mine.path has no value. Fix: set"),
        ((f"{SECTION}.path=null", f"{SECTION}.mine.take=3"), f"{SECTION}.mine.path=None is not allowed"),
        (("+source.train={mine: {path: a}}",), "source.train.mine.path is not a key of the config"),
    ],
)
def test_other_mistakes_are_named(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(Exception) as error:  # noqa: PT011  # Hydra has errors of its own
        composed(words, tmp_path)
    assert message in str(explain(error.value))


def test_every_known_set_is_documented(config: Config) -> None:
    page = (CONF.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    chosen = [f"source/{name}=[{','.join(known)}]" for name, known in KNOWN.items()]
    for key, entry in sets(config(*chosen)).items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{key.partition('.')[2]}` |"))
        assert str(entry.hub) in row
