"""Where the configs are: `CONF` is the folder that Hydra searches."""

from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parents[1]
CONF: Final = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The folder of configs: inside the package in an installation from a wheel, next to it in a clone."""
