"""Progress of an unfinished selection: `Progress`, a file from which the same command continues."""

import logging
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lisa_lightning.runtime.errors import UserError, first_line, printable
from lisa_lightning.runtime.files import atomic_write, reraise_write_errors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Saves the tensors of a selection every few steps, and loads them when the same selection is run again."""

    path: Path
    key: str
    """Hash of the inputs of the selection."""
    every: int
    """Steps between two saves."""

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """Return the number of finished steps and the tensors at that time; 0 and {} at the start.

        The progress of a selection with other inputs is ignored.

        Raises:
            UserError: if the file is damaged.
        """
        if not self.path.exists():
            return 0, {}
        try:
            with safe_open(self.path, "pt") as file:
                metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if metadata["key"] != self.key:
                return 0, {}
            if metadata["sha256"] != _digest(tensors):
                raise ValueError("its content has changed")
            step = int(metadata["step"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = printable(first_line(error))[:200]
            raise UserError(
                f"{self.path} can't be used ({reason}). Fix: delete it; the stage then starts again"
            ) from error
        log.info("curate continues after step %d.", step)
        return step, tensors

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Save the tensors after a number of finished steps, if they are due."""
        if step % self.every:
            return
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"key": self.key, "step": str(step), "sha256": _digest(on_cpu)}
        with reraise_write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as part:
                save_file(on_cpu, part, metadata)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
