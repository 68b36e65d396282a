"""Checkpoint files: written atomically, verified and loaded without unpickling."""

import os
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import atomic_write, reraise_write_errors

CHECKPOINTED = (
    "state_dict",
    "method_state",
    "key",
    "optimizer_states",
    "callbacks",
    "loops",
    "LisaDataModule",
    "global_step",
)
"""Keys of every checkpoint."""
CALLBACK_STATES = {"Checkpoint": {"seconds", "peak_mib"}, "ResumeCurves": {"rows"}}
"""Keys of each callback's state in a checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written beside their place, then renamed; loading never unpickles."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace the checkpoint at `path` as one act. Raises UserError where it can't be written."""
        final = Path(path)
        with reraise_write_errors(final):
            final.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(final) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Return a checkpoint: plain containers and tensors, no bit of which has changed since it was written.

        Raises:
            UserError: if the file is damaged, or is no checkpoint of this project and version of Lightning.
        """
        try:
            # torch doesn't verify the checksums that its own files carry.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it has changed")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            _refuse_no_checkpoint(checkpoint)
        except MemoryError:
            raise
        except Exception as error:
            raise broken_checkpoint(Path(path), error) from error
        return checkpoint


def _refuse_no_checkpoint(checkpoint: Any) -> None:
    """Raise ValueError where the content of a file is not what `fit` can go on from."""
    if not isinstance(checkpoint, dict):
        raise ValueError("it holds no checkpoint")
    if missing := [name for name in CHECKPOINTED if name not in checkpoint]:
        raise ValueError(f"it lacks {missing[0]}")
    for callback, names in CALLBACK_STATES.items():
        if not names <= checkpoint["callbacks"].get(callback, {}).keys():
            raise ValueError(f"it lacks the state of {callback}")
    if (version := checkpoint.get("pytorch-lightning_version")) != L.__version__:
        raise ValueError(f"it was written by Lightning {version}, and this is {L.__version__}")


def broken_checkpoint(path: Path, error: Exception) -> UserError:
    """Return the error for a checkpoint that training can't go on from."""
    reason = printable(first_line(error))[:200]
    return UserError(
        f"{path} can't be used ({type(error).__name__}: {reason}). Fix: delete it; the stage then starts again"
    )
