"""The log of a run: `prepare_logs` passes all messages of this project, and only the warnings of libraries."""

import io
import logging
import warnings

from lisa_lightning.runtime.errors import printable

PACKAGE = __name__.partition(".")[0]


def prepare_logs() -> None:
    """Adapt Hydra's logging to a run.

    - Libraries' messages below WARNING are dropped, because HTTP clients log the address of every request. It may
      contain a password. A root logger below INFO, as set by `hydra.verbose=true`, is left unchanged.
    - Control characters are removed from messages, which may quote foreign text.
    - Log files are UTF-8 in every locale.
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
    """Remove control characters from a message. A traceback below it keeps its lines."""
    record.msg, record.args = printable(record.getMessage()), None
    return True


def silence_libraries() -> None:
    """Hide progress bars and known notices of libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # As lines of the log, warnings of libraries never share a line with a progress bar.
    logging.captureWarnings(True)
    for message in ("`is_gradient_checkpointing` is deprecated", ".*treespec, LeafSpec"):
        warnings.filterwarnings("ignore", message=message)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
