"""The LightningDataModule: streams interleaved by state, resumable at any step."""

from collections.abc import Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Sampler

from lisa_lightning.data.interleave import StepBatches


class LisaDataModule(L.LightningDataModule):
    """Serves one `Step` per optimizer step as a single Lightning epoch.

    The place in the run lives here, because Lightning restores a data module before it builds the loader.
    """

    def __init__(self, steps: StepBatches) -> None:
        super().__init__()
        self.steps = steps
        self.position = 0

    def train_dataloader(self) -> DataLoader:
        """Steps from the restored position to the end, in order."""
        trainer = self.trainer
        if trainer is not None:
            self.steps.rank, self.steps.world = trainer.global_rank, trainer.world_size
        return DataLoader(self.steps, sampler=_From(self.position, len(self.steps)), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """The number of finished steps."""
        return {"position": self.trainer.global_step if self.trainer is not None else self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the finished steps."""
        self.position = state_dict["position"]


class _From(Sampler[int]):
    """start, start + 1, ... while its length stays that of the whole run, by which Lightning tells the end."""

    def __init__(self, start: int, length: int) -> None:
        self.start = start
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))

    def __len__(self) -> int:
        return self.length
