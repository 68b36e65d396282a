"""Program that runs a server until its own standard input ends, then ends the server and its whole process group.

The input ends with the run that has started this program, however the run ends: also by SIGKILL. Then a server would
otherwise go on and occupy a GPU. It imports nothing of the package, and leads the process group.

    python _guard.py SECONDS COMMAND...

SECONDS is the time from SIGTERM to SIGKILL.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress


def main(grace_s: float, words: list[str]) -> int:
    """Run a command and return its exit status."""
    # A handler, unlike SIG_IGN, is not inherited by the server.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    ending = threading.Event()
    thread = threading.Thread(target=_end_with_input, args=(server, grace_s, ending), daemon=True)
    thread.start()
    status = server.wait()
    if ending.is_set():
        thread.join()
    return status if status >= 0 else 128 - status


def _end_with_input(server: "subprocess.Popen[bytes]", grace_s: float, ending: threading.Event) -> None:
    # A read of sys.stdin would hold its lock while the interpreter ends, and abort it.
    while os.read(0, 4096):
        pass
    ending.set()
    os.killpg(0, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        server.wait(grace_s)
    # The server's own children may live on. This process ends too.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
