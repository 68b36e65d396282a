"""Lisa inside the Trainer of transformers or TRL: `LisaMixin`.

Start reading at `LisaMixin.training_step` and `StepSampler`.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import torch.utils.data
from datasets import Dataset, concatenate_datasets
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import ConcatDataset, Sampler

from lisa_lightning.config.instances import parse
from lisa_lightning.data.interleave import row_permutation
from lisa_lightning.data.schedule import Schedule, State
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.model.factors import trainable
from lisa_lightning.objective.proximal import add_gradient, snapshot, squared_distance
from lisa_lightning.runtime.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import Trainer
else:
    # The class after the mixin is the trainer, of transformers or of TRL.
    Trainer = object

ANCHOR_FILE: Final = "lisa_anchor.safetensors"
"""File in a checkpoint's folder with the anchor, and the settings of its run as metadata."""
STREAMS: Final[tuple[State, ...]] = ("alignment", "user")
"""Order of the streams of `LisaDataModule`. The index of a stream is part of the seed of its permutations."""
MARKER: Final = "lisa_is_alignment"
"""Column that marks alignment rows while the trainer prepares (tokenizes, filters, shuffles) the concatenated sets."""


class LisaMixin(Trainer):
    """Mixin that adds Lisa to a Trainer of transformers, or to a subclass such as the SFTTrainer of TRL.

        class LisaSFTTrainer(LisaMixin, SFTTrainer): ...

    The rows, their order and the penalty are those of `LisaModule` with the method `Lisa`. Model, optimizer and
    learning rates are the trainer's:
        - The rows of a step follow from its number and the seed (`data_seed` or `seed` of the arguments). Processes and
          micro-batches share them as in any other training.
        - Both sets go through the preparation of the trainer together.
        - Without `max_steps`, `num_train_epochs` counts passes over the user's rows, over steps of both states, as
          `optim.epochs` does.
        - To the trainer the whole training is one epoch, so that strategies "epoch" evaluate and save at its end.
        - The logs have the drift ||w - anchor||^2 as `proximal/drift`.

    Args:
        model: the model, as for the trainer.
        args: the arguments of the trainer.
        train_dataset: the user's rows.
        alignment_dataset: the provider's alignment rows, with the columns of the user's rows.
        alignment_steps: K1, alignment steps of a cycle. The paper's value is 100.
        user_steps: K2, user steps of a cycle. The paper's value is 900.
        rho: proximal factor. The paper's value is 1.
        proximal_after: share of all steps before the penalty starts. The paper's value is 0.
        **kwargs: all other arguments of the trainer.

    Raises:
        UserError: if a setting has a wrong value, a set is unsuitable, or an argument of the trainer conflicts with
            the schedule or the penalty.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        train_dataset: Any,
        alignment_dataset: Any,
        alignment_steps: int = Lisa.alignment_steps,
        user_steps: int = Lisa.user_steps,
        rho: float = Lisa.rho,
        proximal_after: float = Lisa.proximal_after,
        **kwargs: Any,
    ) -> None:
        settings = {"alignment_steps": alignment_steps, "user_steps": user_steps}
        settings |= {"rho": rho, "proximal_after": proximal_after}
        self.lisa = parse(Lisa, settings, "LisaMixin")
        self.anchor: list[Tensor] | None = None
        """Trainable weights at the last switch; None before the first step."""
        _refuse_packing(args)
        concatenated = _concatenate(train_dataset, alignment_dataset)
        super().__init__(model=model, args=args, train_dataset=concatenated, **kwargs)
        _refuse_unsupported(self)
        self.train_dataset, self.stream_rows = _split(self.train_dataset)
        _refuse_empty(self.stream_rows, self.lisa.schedule)
        if self.args.max_steps <= 0:
            self.args = copy.copy(self.args)
            self.args.max_steps = self._steps_of_epochs()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with the anchor at the present weights or, after a resume, at that of the checkpoint."""
        self.anchor = None
        return super().train(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a micro-batch. With the last one of a step, add the penalty's gradient.

        At that point the gradient is complete over micro-batches and processes, and not clipped yet.
        """
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._add_penalty()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log metrics, those of training with the drift."""
        if self.anchor is not None and "loss" in logs:
            weights = trainable(self._module).values()
            logs["proximal/drift"] = squared_distance(list(weights), self.anchor).item()
        super().log(logs, *args, **kwargs)

    @property
    def _module(self) -> torch.nn.Module:
        """The model that is trained."""
        assert isinstance(self.model, torch.nn.Module)
        return self.model

    def _add_penalty(self) -> None:
        """Move the anchor if the state has changed, and add rho * (w - anchor) to the gradients."""
        step = self.state.global_step
        weights = list(trainable(self._module).values())
        if self.anchor is None or self.lisa.schedule.switches_at(step):
            # No weight has changed since the step began.
            self.anchor = snapshot(weights)
        if self.lisa.rho > 0 and step > self.lisa.proximal_after * self.state.max_steps:
            add_gradient([_gradient(w) for w in weights], weights, self.anchor, self.lisa.rho)

    def _get_train_sampler(self, train_dataset: Any = None) -> "StepSampler":
        size = self.get_total_train_batch_size(self.args)
        return StepSampler(self.stream_rows, self.lisa.schedule, size, self.args.max_steps, self._data_seed)

    def _steps_of_epochs(self) -> int:
        steps_per_epoch = -(-len(self.stream_rows["user"]) // self.get_total_train_batch_size(self.args))
        return math.ceil(self.args.num_train_epochs * steps_per_epoch)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _run_settings(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the run that resumes from it."""
        counts = {f"{stream}_rows": len(rows) for stream, rows in self.stream_rows.items()}
        size = self.get_total_train_batch_size(self.args)
        return asdict(self.lisa) | counts | {"rows_per_step": size, "seed": self._data_seed}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the anchor first, so that every complete checkpoint has one."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            weights = trainable(self._module)
            anchor = self.anchor or snapshot(list(weights.values()))
            tensors = {name: tensor.contiguous() for name, tensor in zip(weights, anchor, strict=True)}
            save_file(tensors, folder / ANCHOR_FILE, {"settings": json.dumps(self._run_settings())})
        super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        tensors, settings = _read_anchor(resume_from_checkpoint)
        weights = trainable(self._module)
        _refuse_other_settings(resume_from_checkpoint, settings, self._run_settings())
        _refuse_other_weights(resume_from_checkpoint, tensors, weights)
        self.anchor = [tensors[name].to(weight.device) for name, weight in weights.items()]


class StepSampler(Sampler[int]):
    """Sampler of the rows of all optimizer steps, in the order of `StepBatches`.

    Args:
        rows: indices of each stream's rows in the dataset.
        schedule: the states.
        rows_per_step: rows of a step over all micro-batches and processes.
        steps: number of optimizer steps.
        seed: seed of all permutations.
    """

    def __init__(
        self, rows: Mapping[State, np.ndarray], schedule: Schedule, rows_per_step: int, steps: int, seed: int
    ) -> None:
        self.rows = rows
        self.schedule = schedule
        self.rows_per_step = rows_per_step
        self.steps = steps
        self.seed = seed

    def __len__(self) -> int:
        return self.steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        for step in range(self.steps):
            stream = self.schedule.state(step)
            first = self.schedule.steps_in(stream, step) * self.rows_per_step
            yield from (self._row(stream, position) for position in range(first, first + self.rows_per_step))

    def _row(self, stream: State, position: int) -> int:
        """Return the dataset index at a position of the concatenated permutations of a stream."""
        rows = self.rows[stream]
        epoch, offset = divmod(position, len(rows))
        return int(rows[row_permutation(self.seed, STREAMS.index(stream), epoch, len(rows))[offset]])


def _concatenate(user: Any, alignment: Any) -> Any:
    """Return the user's rows followed by the alignment rows, marked if they are of the `datasets` library."""
    for name, rows in (("train_dataset", user), ("alignment_dataset", alignment)):
        if not hasattr(rows, "__len__") or isinstance(rows, torch.utils.data.IterableDataset):
            raise UserError(
                f"{name}={type(rows).__name__}: the schedule draws rows by their index, which this set does not have. "
                "Fix: load it without streaming"
            )
    if not isinstance(user, Dataset) or not isinstance(alignment, Dataset):
        parts: list[Any] = [user, alignment]
        return ConcatDataset(parts)
    if set(user.column_names) != set(alignment.column_names):
        raise UserError(
            f"alignment_dataset: its columns are {', '.join(alignment.column_names)}, and those of train_dataset "
            f"{', '.join(user.column_names)}. Fix: rename or remove columns until both agree"
        )
    try:
        concatenated = concatenate_datasets([user, alignment])
    except ValueError as error:
        raise UserError(
            f"alignment_dataset: its columns have other types than those of train_dataset ({first_line(error)}). "
            "Fix: alignment_dataset.cast(train_dataset.features)"
        ) from error
    is_alignment = [False] * len(user) + [True] * len(alignment)
    return concatenated.add_column(MARKER, is_alignment)  # type: ignore[call-arg]


def _split(prepared: Any) -> tuple[Any, dict[State, np.ndarray]]:
    """Return the prepared dataset without its marker, and the indices of each stream's rows."""
    if isinstance(prepared, ConcatDataset):
        user_count = prepared.cumulative_sizes[0]
        return prepared, {"alignment": np.arange(user_count, len(prepared)), "user": np.arange(user_count)}
    is_alignment = np.asarray(prepared.with_format("numpy")[MARKER][:], dtype=bool)
    rows: dict[State, np.ndarray] = {
        "alignment": np.flatnonzero(is_alignment),
        "user": np.flatnonzero(~is_alignment),
    }
    return prepared.remove_columns(MARKER), rows


def _gradient(weight: Tensor) -> Tensor:
    """Return the gradient of a weight; zeros if the loss does not depend on it."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _refuse_packing(args: Any) -> None:
    if getattr(args, "packing", False):
        raise UserError(
            "packing=True: a packed row would mix rows of the user and of alignment. "
            "Fix: packing=False; padding_free=True avoids padding as well"
        )


def _refuse_unsupported(trainer: Trainer) -> None:
    """Raise UserError for settings of the trainer that conflict with the schedule or the penalty."""
    args = trainer.args
    strategy = getattr(args, "train_sampling_strategy", "random")
    is_sharded = getattr(args, "parallelism_config", None) is not None or getattr(
        trainer.model, "is_distributed_loading_by_transformers", False
    )
    sharded = "the penalty needs whole weights and gradients in every process"
    refusals = (
        (trainer.is_deepspeed_enabled, f"deepspeed: {sharded}", "train with DDP (torchrun)"),
        (trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled, f"fsdp: {sharded}", "train with DDP (torchrun)"),
        (is_sharded, f"parallelism_config: {sharded}", "train with DDP (torchrun)"),
        (
            getattr(trainer.accelerator, "scaler", None) is not None,
            "fp16=True: gradients are multiplied by the scale of the loss, and the penalty's would not be",
            "bf16=True, or full precision",
        ),
        (
            strategy != "random",
            f"train_sampling_strategy={strategy}: the schedule determines the order of rows",
            "remove train_sampling_strategy",
        ),
        (
            getattr(args.accelerator_config, "split_batches", False),
            "split_batches=True: a step would have fewer rows than the schedule counts",
            "split_batches=False, and a smaller per_device_train_batch_size",
        ),
        (
            args.auto_find_batch_size,
            "auto_find_batch_size=True: a training that starts again with smaller batches would visit other rows",
            "set per_device_train_batch_size",
        ),
        (
            args.ignore_data_skip,
            "ignore_data_skip=True: a resumed training would draw the rows of its first steps again",
            "remove ignore_data_skip; skipping only advances the indices and loads no rows",
        ),
    )
    for is_refused, problem, fix in refusals:
        if is_refused:
            raise UserError(f"{problem}. Fix: {fix}")


def _refuse_empty(stream_rows: Mapping[State, np.ndarray], schedule: Schedule) -> None:
    """Raise UserError if a set has no rows that the schedule draws from."""
    settings: dict[State, tuple[str, int]] = {
        "alignment": ("alignment_dataset", schedule.alignment_steps),
        "user": ("train_dataset", schedule.user_steps),
    }
    for stream, (name, steps) in settings.items():
        if steps and not len(stream_rows[stream]):
            raise UserError(f"{name}: it has no rows, and {stream}_steps={steps} draws some. Fix: {stream}_steps=0")


def _read_anchor(checkpoint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return anchor and settings of a checkpoint. Raises UserError if the file is missing or damaged."""
    try:
        with safe_open(Path(checkpoint, ANCHOR_FILE), framework="pt") as file:
            settings = json.loads(file.metadata()["settings"])
            return {name: file.get_tensor(name) for name in file.keys()}, settings  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"resume_from_checkpoint={checkpoint}: cannot read {ANCHOR_FILE} ({first_line(error)}). "
            "Fix: resume from another checkpoint of a trainer with LisaMixin"
        ) from error


def _refuse_other_settings(checkpoint: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise UserError naming the settings in which the run of a checkpoint differs."""
    different = [name for name in current if saved.get(name) != current[name]]
    if different:
        changes = "; ".join(f"{name}: {saved.get(name)} saved, {current[name]} now" for name in different)
        raise UserError(
            f"resume_from_checkpoint={checkpoint}: it belongs to a run with other settings ({changes}). "
            "Fix: resume with the saved ones, or start without resume_from_checkpoint"
        )


def _refuse_other_weights(checkpoint: str, anchor: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Raise UserError unless the anchor has the names and shapes of the weights."""
    if {n: t.shape for n, t in anchor.items()} != {n: w.shape for n, w in weights.items()}:
        raise UserError(
            f"resume_from_checkpoint={checkpoint}: its anchor has other names or shapes than the trainable weights. "
            "Fix: resume with the model and the adapter settings of that run"
        )
