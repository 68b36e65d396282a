"""What the tests share: a tiny random Llama with a byte tokenizer, and composed configs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chat_server import url  # noqa: F401  # a fixture
from hydra import compose, initialize_config_dir
from judge_models import classifier, guard  # noqa: F401  # fixtures
from omegaconf import DictConfig
from training import train  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def config() -> Callable[..., DictConfig]:
    """`config("experiment=smoke", ...)`: the config that run.py would see."""

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            return compose("config", list(overrides))

    return composed


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, config: Callable[..., DictConfig]) -> Path:
    """The folder of the tiny model."""
    from lisa_lightning.base_model import base_model
    from lisa_lightning.cache import OneRank

    return base_model(OneRank(), config("model=tiny").model, tmp_path_factory.mktemp("cache"))[0]
