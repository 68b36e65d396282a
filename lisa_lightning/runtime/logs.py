"""The log of a run: `prepare_logs` lets this project's messages through, and of libraries' only warnings."""

import io
import logging
import warnings

from lisa_lightning.runtime.errors import printable

PACKAGE = __name__.partition(".")[0]


def prepare_logs() -> None:
    """Change what Hydra has set up, for a run.

    - Libraries' messages below a warning are dropped: HTTP clients log the address of every request, which may hold a
      password. A root logger below INFO, as `hydra.verbose=true` sets it, is left alone.
    - Control characters of other people's texts are removed from messages.
    - Files are UTF-8, whatever the locale.
    """
    root = logging.getLogger()
    if root.level == logging.INFO:
        root.setLevel(logging.WARNING)
        logging.getLogger(PACKAGE).setLevel(logging.INFO)
    for handler in root.handlers:
        handler.addFilter(_make_printable)
        stream = getattr(handler, "stream", None)
        if isinstance(handler, logging.FileHandler) and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")


def _make_printable(record: logging.LogRecord) -> bool:
    """Remove control characters from a message; a traceback below it keeps its lines."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def silence_libraries() -> None:
    """Keep libraries' greetings out of the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Warnings of libraries become lines of the log, which never share a line with a progress bar.
    logging.captureWarnings(True)
    for known in ("`is_gradient_checkpointing` is deprecated", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=known)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
