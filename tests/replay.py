"""Command of tests/golden/replay.py: `python tests/replay.py [CASE ...]`."""

import sys

from golden.replay import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
