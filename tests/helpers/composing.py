"""Requests as the command would make them, for tests that run the pipeline in this process."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from helpers.paths import CONF
from lisa_lightning.config.validate import check
from lisa_lightning.pipeline.api import compose_request
from lisa_lightning.pipeline.request import Request


def composed(words: Sequence[str], out: Path) -> Request:
    """Return the accepted request of these overrides."""
    request = compose_request(words, out)
    check(request.cfg)
    return request


def composed_job(words: Sequence[str], out: Path) -> DictConfig:
    """Return the config of a sweep's job, and set `HydraConfig` as Hydra does for it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", list(words), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(out)
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    return cfg
