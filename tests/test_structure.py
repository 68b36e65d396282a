"""The layout of the project: config groups and their folders of code, imports without cycles, the cache key."""

import ast
import re
from collections.abc import Callable, Container, Iterator
from graphlib import TopologicalSorter

import pytest
from omegaconf import DictConfig, OmegaConf

from faults import IN_RUNS, IN_TRAINING, stale
from helpers.paths import ROOT
from lisa_lightning.config.rules import RULES
from lisa_lightning.config.validate import flat
from lisa_lightning.runtime.cache import code_files

CHOICES = ("align", "attack", "curate", "engine", "judge", "method", "repair", "task")
LIGHTNING = ("callbacks", "logger")
"""Config groups whose files name classes of Lightning too."""
"""Config groups whose files name a class."""
OURS = [f for d in ("lisa_lightning", "benchmarks", "experiments", "tests") for f in sorted((ROOT / d).rglob("*.py"))]


def test_every_group_that_names_a_class_has_a_folder_of_code() -> None:
    naming = {f.parent.name for f in (ROOT / "conf").rglob("*.yaml") if re.search(r"^ *_target_:", f.read_text(), re.M)}
    assert naming == {*CHOICES, *LIGHTNING}


@pytest.mark.parametrize("group", CHOICES)
def test_a_choice_is_the_file_of_its_name(group: str) -> None:
    """Configs and files of code have the same names.

    Names that begin with an underscore are no choices in either folder, and base.py defines a choice.
    """
    conf = {f.stem: f.read_text() for f in (ROOT / "conf" / group).glob("[!_]*.yaml") if f.stem != "none"}
    code = {f.stem for f in (ROOT / "lisa_lightning" / group).glob("[!_]*.py")} - {"base"}
    assert set(conf) == code
    for name, text in conf.items():
        assert f"_target_: lisa_lightning.{group}.{name}." in text


RULED_ELSEWHERE = (
    r"source\.refusals|((align\.)?method|attack|curate|filter|repair|engine|judge|logger|callbacks)(\..*)?"
    r"|evaluate\.variants\..*"
    r"|task\.(question_suffix|(embedded|hub)\..*)"
    r"|.*\.(columns|labels|where)\..*|.*_target_"
)
"""Keys with rules elsewhere.

They are a requested path, keys that are null without alignment, keys that a source takes over, and a user's columns.
"""


@pytest.mark.slow
@pytest.mark.parametrize("group", sorted(f.name for f in (ROOT / "conf").iterdir() if f.is_dir()))
def test_every_key_has_a_rule(config: Callable[..., DictConfig], group: str) -> None:
    folder = ROOT / "conf" / group
    for file in folder.glob("[!_]*.yaml") if group not in ("paper", "sweep") else ():
        name = file.stem
        cfg = OmegaConf.to_container(config(f"{group}={f'[{name}]' if group == 'judge' else name}"), resolve=False)
        assert isinstance(cfg, dict)
        assert [k for k, _ in flat(cfg) if k not in RULES and not re.fullmatch(RULED_ELSEWHERE, k)] == []


def test_every_file_says_what_it_holds() -> None:
    assert [file for file in OURS if not ast.get_docstring(ast.parse(file.read_text()))] == []


def test_no_file_imports_itself_over_others() -> None:
    """Imports of files and of folders have no cycle. Imports inside functions count, as they only hide cycles."""
    files = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in OURS}
    imports = {name: {_file_of(m, files) for m in _modules(ast.parse(f.read_text()))} for name, f in files.items()}
    imports = {name: found - {name, None} for name, found in imports.items()}
    assert "lisa_lightning.pipeline.run" in imports["lisa_lightning.pipeline.sweep"]  # from within a function
    tuple(TopologicalSorter(imports).static_order())
    folders: dict[str, set[str]] = {}
    for name, imported in imports.items():
        if name.startswith("lisa_lightning."):
            inside = [str(other).split(".")[1] for other in imported if str(other).startswith("lisa_lightning.")]
            folders.setdefault(name.split(".")[1], set()).update(inside)
    tuple(TopologicalSorter({name: others - {name} for name, others in folders.items()}).static_order())


def test_every_fault_names_a_piece_of_the_code_and_a_test() -> None:
    assert [problem for fault in [*IN_TRAINING, *IN_RUNS] if (problem := stale(fault))] == []


def test_the_package_root_has_few_entries() -> None:
    """The package has at most 10 entries beside the folders of config groups. Its documentation must explain each."""
    groups = {f.name for f in (ROOT / "conf").iterdir() if f.is_dir()} | {"trainer", "model", "logger", "callbacks"}
    tracked = {f.name for f in (ROOT / "lisa_lightning").iterdir() if f.name != "__pycache__"}
    assert len(tracked - groups) <= 10


def test_the_cache_key_covers_all_code_that_can_change_a_result() -> None:
    package = ROOT / "lisa_lightning"
    covered = {f.relative_to(package).as_posix() for f in code_files()}
    left_out = {f.relative_to(package).as_posix() for f in package.rglob("*.py")} - covered
    assert {name for name in left_out if name.partition("/")[0] not in ("report", "judge")} == {
        *("config/arguments.py", "config/explain.py", "config/help.py", "config/parameters.py", "config/paths.py"),
        *("config/suggest.py", "config/tables.py", "pipeline/command.py", "pipeline/sweep.py", "runtime/logs.py"),
        *("config/expression.py", "pipeline/search.py"),
        *("evaluation/paired.py", "pipeline/adapter_folder.py", "pipeline/export.py", "runtime/upload.py", "hf.py"),
    }
    assert {"objective/proximal.py", "method/lisa.py", "data/interleave.py", "pipeline/run.py"} <= covered


def test_architecture_page_names_existing_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    files = re.findall(r"`([a-z_/]+\.py)`", page)
    assert len(files) > 20
    assert [name for name in files if name != "base.py" and not (ROOT / "lisa_lightning" / name).exists()] == []
    assert len(page.split()) <= 400


def _file_of(module: str, files: Container[str]) -> str | None:
    """Return the project's file that has a module, or a name in one."""
    return next((m for m in (module, module.rpartition(".")[0]) if m in files), None)


def _modules(tree: ast.AST) -> Iterator[str]:
    """Yield all imported modules, and names with their module, except imports for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from _modules(node)
