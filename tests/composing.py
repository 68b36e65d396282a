"""The config of a command as its job would have it, for tests that run the pipeline in this process."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from lisa_lightning.config.validate import check

CONF = Path(__file__).parents[1] / "conf"


def composed(words: Sequence[str], out: Path) -> DictConfig:
    """The accepted config of these overrides, with `out` as Hydra's output folder."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", list(words), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(out)
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    check(cfg)
    return cfg
