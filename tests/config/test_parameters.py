"""Settings classes: every parameter is described, the page of tables is current, and their values are JSON."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig
from pydantic.dataclasses import is_pydantic_dataclass

from helpers.paths import CONF, ROOT
from lisa_lightning.config.instances import NO_ARGUMENTS, class_sections, load_class, parse
from lisa_lightning.config.parameters import parameters
from lisa_lightning.config.settings import SECTIONS
from lisa_lightning.config.tables import GROUPS, page
from lisa_lightning.config.validate import plain

CHOICES = [f"{group}={f.stem}" for group in GROUPS for f in sorted((CONF / group).glob("[!_]*.yaml"))]
UNPARAMETERIZED = ("judge=embedded", "judge=linear", "judge=probe", "judge=refusal")
"""Judges without parameters of their own."""


def settings_classes() -> Iterator[type[Any]]:
    """Yield the classes of all sections and choices, in any order and more than once."""
    yield from SECTIONS.values()
    for group in GROUPS:
        for file in (CONF / group).glob("[!_]*.yaml"):
            for key, section in class_sections({group: yaml.safe_load(file.read_text(encoding="utf-8"))}):
                cls = load_class(section["_target_"], key)
                if is_pydantic_dataclass(cls):
                    yield cls


@pytest.mark.slow
def test_every_parameter_has_a_meaning_and_allowed_values() -> None:
    described = {(cls.__name__, p.name): p for cls in settings_classes() for p in parameters(cls)}
    assert len(described) > 100
    assert [key for key, p in described.items() if not p.meaning.endswith(".") or not p.allowed] == []
    assert described["SEAL", "keep"].meaning.startswith("Share of the rows to keep, or")


@pytest.mark.slow
def test_the_page_of_tables_is_current() -> None:
    """The page equals the current tables.

    Command after a change: python -m lisa_lightning.config.tables > docs/configuration.md
    """
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page()


@pytest.mark.slow
@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in UNPARAMETERIZED])
def test_the_settings_of_every_choice_are_json_and_those_of_the_config(
    config: Callable[..., DictConfig], choice: str, guard: Path, yes_or_no: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    group, _, name = choice.partition("=")
    needed = {
        "moderation": (f"id={guard}", "harmful_labels=[LABEL_1]"),
        "harmbench": (f"id={yes_or_no}",),
        **dict.fromkeys(("llama_guard", "strongreject_finetuned", "wildguard"), (f"id={guard}",)),
        **dict.fromkeys(
            ("openai", "strongreject", "win_rate"),
            ("model=m", "usd_per_million_input=1", "usd_per_million_output=2"),
        ),
    }
    more = ["engine.base_url=http://localhost:8000/v1"] if choice == "engine=endpoint" else []
    cfg = plain(config(choice, *more, *(f"judge.{name}.{key}" for key in needed.get(name, ()))))
    for key, section in class_sections(cfg):
        if key.partition(".")[0] == group:
            names = section.keys() - {"_target_", *NO_ARGUMENTS.get(key, ())}
            settings = asdict(parse(load_class(section["_target_"], key), {n: section[n] for n in names}, key))
            assert json.loads(json.dumps(settings)) == {n: section[n] for n in names}
