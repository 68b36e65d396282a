"""Arguments before Hydra parses them: paths are taken literally, and a wrong argument ends in one sentence."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from helpers.paths import CONF
from lisa_lightning.config.arguments import prepare_arguments
from lisa_lightning.pipeline.sweep import resolve_sweep_dir
from lisa_lightning.runtime.errors import UserError

GROUPS = sorted(f.name for f in (CONF).iterdir() if f.is_dir())
NAMES = st.text(st.sampled_from("ab=,'\"()[]{} :;\\%#~.-+é"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and not name.startswith(("'", '"'))
)


def parsed(argument: str) -> object:
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.slow
@given(NAMES)
def test_a_folder_of_any_name_is_taken_as_it_is(name: str) -> None:
    """Folders of any name are taken literally. The folders of a sweep's own jobs contain `=` and `,`."""
    for key in ("hydra.run.dir", "responses", "cache_dir"):
        path = f"/some/where/{name}/file"
        (argument,) = prepare_arguments([f"{key}={path}"])
        assert parsed(argument) == path


def test_a_number_stays_one_where_a_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("0", "a"):
        Path(name).mkdir()
    arguments = ["evaluate.every=0", "seed=0,1", "x=[a, 0]"]
    assert prepare_arguments(arguments) == arguments
    assert [parsed(a) for a in prepare_arguments(["model.id=0"])] == ["0"]


def test_a_path_that_exists_is_quoted_whatever_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("lr=1e-3,seed=2")
    folder.mkdir()
    for key in ("judge.linear.rows.header", "model.id", "source.train.path"):
        assert [parsed(a) for a in prepare_arguments([f"{key}={folder}"])] == [str(folder)]
    assert [parsed(a) for a in prepare_arguments(["model.id=/absent/seed=1,lr=2"])] == ["/absent/seed=1,lr=2"]


@pytest.mark.parametrize(
    "argument",
    [
        "model.id=a/b,c/d",
        "model.id=choice(a/b,c/d)",
        "source.train.path=x/a.csv,y/b.csv",
        "seed=1,2",
        "judge=[embedded,refusal]",
        "hydra.run.dir='a=b'",
        "~method",
        "x={a: 1}",
        "x=${seed}",
    ],
)
def test_what_hydra_parses_as_it_is_meant_stays_unchanged(argument: str) -> None:
    flags = ["-m", "--config-dir", "a=b", "--config-name=x"]
    assert prepare_arguments([*flags, argument]) == [*flags, argument]


@pytest.mark.parametrize("group", [*GROUPS, "hydra/launcher"])
@pytest.mark.parametrize("value", ["null", "5", "", "true", "[null]", "null,null", "{a: 1}"])
def test_a_group_takes_the_name_of_an_option(group: str, value: str) -> None:
    with pytest.raises(UserError) as error:
        prepare_arguments([f"{group}={value}"])
    assert str(error.value).startswith(f"{group}={value}: {group} takes the name of an option. Fix: ")
    assert ("=none" in str(error.value)) == (
        group in ("align", "attack", "curate", "filter", "repair", "logger", "callbacks")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["judge=[embedded,", "refusal]"], "judge=[embedded,: it can't be parsed"),
        (["seed=", "3"], "3: an argument must be KEY=VALUE"),
        (["optim.lr"], "optim.lr: an argument must be KEY=VALUE"),
        (["seed==3"], "seed==3: it can't be parsed"),
        (["x=" + "[" * 5000], "it can't be parsed"),
        (["x=a\x1b]0;t\x07(b"], "x=a ]0;t (b: it can't be parsed"),
    ],
)
def test_an_argument_that_can_not_be_parsed_is_named(arguments: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        prepare_arguments(arguments)
    assert expected in str(error.value)
    assert "Fix: " in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("subdir", ["../../escaped", "/tmp/escaped", "a/../../b", "${method}/../.."])
def test_a_jobs_folder_lies_in_its_sweeps(subdir: str) -> None:
    with pytest.raises(UserError, match="lies outside the sweep's folder"):
        resolve_sweep_dir(["-m", "seed=1,2", f"hydra.sweep.subdir={subdir}"])
