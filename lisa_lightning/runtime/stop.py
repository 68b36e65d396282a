"""Signals that stop a run so that it can be continued: `STOP_SIGNALS` and `Stopped`."""

from signal import Signals
from typing import Final

STOP_SIGNALS: Final = (Signals.SIGTERM, Signals.SIGUSR1)
"""Slurm sends SIGTERM when it preempts or cancels a job. SIGUSR1 is its usual warning before the time limit."""


class Stopped(SystemExit):
    """Exit of a run that a signal has stopped.

    Args:
        number: the signal.
    """

    def __init__(self, number: Signals) -> None:
        super().__init__(128 + number)
        self.signal = number
