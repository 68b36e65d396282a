"""Program that runs a server until its own standard input ends, then ends the server and its whole process group.

The input ends with the run that has started this program, however the run ends: also by SIGKILL. Then a server would
otherwise go on and occupy a GPU. It imports nothing of the package, and leads the process group.

    python _guard.py COMMAND...
"""

import os
import signal
import subprocess
import sys
import threading

GRACE_S = 10.0
"""Seconds from SIGTERM to SIGKILL."""


def main(words: list[str]) -> int:
    """Run a command and return its exit status."""
    # A handler, unlike SIG_IGN, is not inherited by the server.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    ending = threading.Event()
    thread = threading.Thread(target=_end_with_input, args=(server, ending), daemon=True)
    thread.start()
    status = server.wait()
    if ending.is_set():
        thread.join()
    return status if status >= 0 else 128 - status


def _end_with_input(server: "subprocess.Popen[bytes]", ending: threading.Event) -> None:
    sys.stdin.buffer.read()
    ending.set()
    os.killpg(0, signal.SIGTERM)
    try:
        server.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        pass
    # The server's own children may live on. This process ends too.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
