"""`python run.py` that waits two seconds, not a minute, for files of another node."""

import sys

from lisa_lightning.pipeline.command import start
from lisa_lightning.runtime import shared_folders

if __name__ == "__main__":
    shared_folders.TIMEOUT_S = 2.0  # type: ignore[misc]
    sys.exit(start())
