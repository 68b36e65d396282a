"""The LightningDataModule: `LisaDataModule` interleaves the streams by state, and resumes at any step."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Sampler

from lisa_lightning.config.fields import Template
from lisa_lightning.data.encoding import Encoder, Tokenization
from lisa_lightning.data.interleave import Batch, BatchPlan, Examples, StepBatches
from lisa_lightning.data.packing import Example, Packing
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, as_row
from lisa_lightning.runtime.errors import UserError


class LisaDataModule(L.LightningDataModule):
    """Yields one `Step` per optimizer step, all of them as a single Lightning epoch.

    Rows are `Row` objects or mappings with the keys `instruction`, `response` and, optionally, `context` and `system`.
    Any sequence of them is accepted, such as a list or a `datasets.Dataset`.

    The position in the run is stored here, because Lightning restores a data module before it builds the loader.

    Args:
        tokenizer: of the model.
        user: the user's rows, harmful ones included.
        alignment: refusals and other safe rows of the provider.
        defender: harmful rows of the provider, for methods that require them.
        batch_size: rows of a micro-batch and rank; None for that of the module's `Optim`.
        max_length: tokens of a row; the rest is truncated.
        template: of the prompts: alpaca, alpaca_newline or chat.
        tokenization: of prompt and answer: separate or joined.
        discard: draw user rows in alignment steps too and discard them, as the official code does.
    """

    def __init__(
        self,
        tokenizer: Any,
        user: Sequence[Row] | Sequence[Mapping[str, Any]] = (),
        alignment: Sequence[Row] | Sequence[Mapping[str, Any]] = (),
        defender: Sequence[Row] | Sequence[Mapping[str, Any]] = (),
        *,
        batch_size: int | None = None,
        max_length: int = 256,
        template: Template = "chat",
        tokenization: Tokenization = "separate",
        discard: bool = False,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.batch_size = batch_size
        self.discard = discard
        self.position = 0
        """Number of finished steps."""
        self._encode = Encoder(tokenizer, template, max_length, tokenization)
        rows: dict[Stream, Sequence[Any]] = {"alignment": alignment, "user": user, "defender": defender}
        # The index of a stream is part of the seed of its order. At alignment, without user rows, recorded runs have
        # the alignment rows in second place.
        order: tuple[Stream, ...] = (
            ("alignment", "user", "defender") if len(user) else ("user", "alignment", "defender")
        )
        self.streams: dict[Stream, Examples] = {name: Examples(rows[name], self._example) for name in order}
        self._steps: StepBatches | None = None

    def _example(self, row: Row | Mapping[str, Any]) -> Example:
        return self._encode(as_row(row))

    @property
    def row_count(self) -> int:
        """The number of user rows or, without any, of alignment rows: what epochs are counted in."""
        return len(self.streams["user"]) or len(self.streams["alignment"])

    @property
    def steps(self) -> StepBatches:
        """The data of each step. Raises UserError before a `LisaModule` has called `connect`."""
        if self._steps is None:
            raise UserError("LisaDataModule has no training plan. Fix: fit a LisaModule with it")
        return self._steps

    def connect(
        self,
        plan: BatchPlan,
        packing: Packing,
        total_steps: int,
        batch_size: int,
        accumulate: int,
        seed: int,
        *,
        even: bool = False,
    ) -> None:
        """Set what the batches depend on besides the rows. `LisaModule.setup` calls it.

        Args:
            plan: the method.
            packing: `pack` or `pad`.
            total_steps: optimizer steps of the training.
            batch_size: rows of a micro-batch and rank, unless the data module has its own.
            accumulate: micro-batches of a step.
            seed: of the order of rows.
            even: give all ranks as many packs, as a sharded model needs.
        """
        size = self.batch_size or batch_size
        self._steps = StepBatches(
            self.streams, packing, plan, total_steps, size, accumulate, seed, discard=self.discard, even=even
        )

    def iter_stream(
        self, stream: Stream, batch_size: int, padded: bool = False, rows: int | None = None
    ) -> Iterator[Batch]:
        """Yield rows of a stream once, `batch_size` at a time, sharded over the ranks; see `StepBatches`."""
        return self.steps.iter_stream(stream, batch_size, padded, rows)

    def train_dataloader(self) -> DataLoader:
        """Return the steps from the restored position to the end, in order."""
        if self.trainer is not None:
            self.steps.rank, self.steps.world = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(self.steps, sampler=_From(self.position, len(self.steps)), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of finished steps."""
        return {"position": self.trainer.global_step if self.trainer is not None else self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the finished steps."""
        self.position = state_dict["position"]


class _From(Sampler[int]):
    """Yields start, start + 1, ...; its length remains that of the training, from which Lightning infers the end."""

    def __init__(self, start: int, length: int) -> None:
        self.start = start
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))

    def __len__(self) -> int:
        return self.length
