"""The command in a clone: `python run.py experiment=sst2_lisa`."""

import sys

from lisa_lightning.pipeline.command import start

if __name__ == "__main__":
    sys.exit(start())
