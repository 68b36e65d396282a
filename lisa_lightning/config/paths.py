"""Paths of this installation: `CONF` is the folder that Hydra searches, `COMMAND` how this process was started."""

import sys
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).parents[1]
CONF: Final = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
"""The folder of configs: inside the package in an installation from a wheel, next to it in a clone."""
COMMAND: Final = "lisa-lightning" if Path(sys.argv[0]).name == "lisa-lightning" else "python run.py"
"""The command as messages show it: the console command of an installation, or the script of a clone."""
