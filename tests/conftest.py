"""Shared fixtures: a tiny random Llama with a byte tokenizer, composed configs, and commands in forks."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import settings
from omegaconf import DictConfig

from helpers.chat_server import url  # noqa: F401  # a fixture
from helpers.forking import Forked
from helpers.paths import ROOT

# A test must not fail because the machine is busy, and must try the same cases in every run.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


def pytest_configure(config: pytest.Config) -> None:
    """Register the fixtures that import torch in processes that run tests.

    The process that hands tests out does not import torch, since the others wait for it.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        for name in ("helpers.judge_models", "helpers.training"):
            config.pluginmanager.import_plugin(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exclude imports from garbage collection, which would cost every stage of every run a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def config() -> Callable[..., DictConfig]:
    """Return `config("experiment=smoke", ...)`, which composes the config that run.py would see."""

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            return compose("config", list(overrides))

    return composed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., DictConfig]) -> Path:
    """Return the folder of the tiny model."""
    from lisa_lightning.model.base_model import base_model
    from lisa_lightning.runtime.ranks import OneRank

    return base_model(OneRank(), config("model=tiny").model, tmp_path_factory.mktemp("cache"))[0]


@pytest.fixture(scope="session")
def forked() -> Iterator[Forked]:
    """Yield a runner of commands in forks of one process: `forked.run(arguments, cwd, env)`."""
    process = Forked()
    yield process
    process.close()
