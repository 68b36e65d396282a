"""Inputs that all stages share, and the cache of their results. Start at `Setting.run_stage`."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any, final

from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from peft import PeftModel
from transformers import PreTrainedModel

from lisa_lightning.config.requirements import Defense
from lisa_lightning.config.validate import plain
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.packing import Example, Pack, pad
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.model.alignment_delta import Delta, low_rank_deltas
from lisa_lightning.model.lora import attach, attach_saved, load, load_tokenizer
from lisa_lightning.runtime.cache import build_once, cache_folder, package_hash
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import read_json, write_text
from lisa_lightning.runtime.memory import peak_memory_mib, reset_peak_memory
from lisa_lightning.runtime.ranks import Ranks
from lisa_lightning.task.base import Task


@dataclass(frozen=True)
class Model:
    """A model, and optionally an adapter on it."""

    folder: Path
    adapter: Path | None
    """The folder of the adapter."""

    @property
    def name(self) -> list[str]:
        """Names of the model's and the adapter's folder, which are hashes of their inputs; "" without an adapter."""
        return [self.folder.name, self.adapter.parent.name if self.adapter else ""]


@final
class Setting:
    """Config, ranks, rows and base model of a run.

    Args:
        cfg: the whole config.
        out: the output folder of the run.
        fabric: the processes of the run, with device and precision.
        ranks: the same processes for steps in which one rank works alone, possibly for hours.
        loggers: loggers of rank zero; None on the other ranks.
        task: the user's task.
        rows: all sets of the source.
        user: the user's rows, harmful ones included.
        base: the folder of the base model.
        base_key: hash of the inputs of the base model.
    """

    def __init__(
        self,
        cfg: DictConfig,
        out: Path,
        fabric: Fabric,
        ranks: Ranks,
        loggers: RunLoggers | None,
        task: Task,
        rows: Rows,
        user: list[Row],
        base: Path,
        base_key: str,
    ) -> None:
        self.cfg = cfg
        self.out = out
        self.fabric = fabric
        self.ranks = ranks
        self.loggers = loggers
        self.task = task
        self.rows = rows
        self.user = user
        self.base = Model(base, None)
        self.cache = cache_folder(cfg.cache_dir)
        self.tokenizer = load_tokenizer(base)
        self.origin: dict[str, Any] = {
            "code": package_hash(),
            "device": fabric.device.type,
            "precision": cfg.trainer.precision,
            "ranks": fabric.world_size,
            "model": {k: cfg.model[k] for k in ("dtype", "attention", "template", "adapters", "quantize")},
            "base": base_key,
            "max_length": cfg.data.max_length,
        }
        """Part of the cache key of every stage."""
        self.trainer_arguments = {name: value for name, value in plain(cfg.trainer).items() if name != "timeout_min"}
        """Arguments of Lightning's Trainer."""
        self.origin |= {package: version(package) for package in ("torch", "transformers", "peft", "lightning")}

    def run_stage(self, name: str, key: dict[str, Any], make: Callable[[Path], Metrics]) -> tuple[Path, Metrics]:
        """Return the result of a stage from the cache, or run the stage.

        Args:
            name: name of the stage, and of its folder in the cache.
            key: inputs of the stage that determine its result, as JSON values.
            make: fills the folder, and is called on every rank if the cache has no result. It returns the cost that
                the last call can't measure: `seconds` and `peak_mib` of an interrupted training.

        Returns:
            The folder of the result, and the cost of the stage when it ran, as metrics.
        """
        built = False

        def build_result(folder: Path) -> None:
            nonlocal built
            built = True
            started = perf_counter()
            # The peak must not include the garbage of earlier stages and runs.
            gc.collect()
            reset_peak_memory(self.fabric.device)
            cost = make(folder)
            cost = {"seconds": perf_counter() - started, "peak_mib": peak_memory_mib(self.fabric.device)} | cost
            if self.fabric.is_global_zero:
                write_text(folder / "stage.json", json.dumps(cost))

        folder = build_once(self.ranks, self.cache / name, self.origin | key, build_result)
        if not built and self.loggers is not None and (folder / "curves.csv").exists():
            self.loggers.take_over(read_rows(folder / "curves.csv"))
        cost = read_json(folder / "stage.json", f"delete {folder}")
        steps = {"train/steps": cost["steps"]} if name == "finetune" else {}
        return folder, {f"time/{name}_s": cost["seconds"], f"memory/{name}_mib": cost["peak_mib"]} | steps

    def export_curves(self, name: str, folder: Path) -> None:
        """Write the curves of a stage into the folder of its result. Only rank zero has curves."""
        assert self.loggers is not None
        self.loggers.curves.export(name, folder / "curves.csv")

    def defender_rows(self, defense: Defense) -> list[Row]:
        """Return the defender rows if the defense needs them, else [], so that its result does not depend on them."""
        return self.rows.defender if "defender_rows" in defense.requirements else []

    def load(self, model: Model, quantize: bool = False) -> PreTrainedModel:
        """Load a model without its adapter.

        Args:
            model: the model.
            quantize: whether to apply `model.quantize`, for training and generation. Repairs need the
                unquantized weights.
        """
        bits = self.cfg.model.quantize if quantize else None
        return load(model.folder, self.cfg.model.dtype, self.cfg.model.attention, bits)

    def attach(self, model: Model, key: str, seed: int) -> PeftModel:
        """Load a model with the adapter to train.

        Args:
            model: the model. If it has an adapter, that is trained further.
            key: config section of a fresh adapter.
            seed: seed of a fresh adapter's weights.
        """
        base = self.load(model, quantize=True)
        if model.adapter:
            return attach_saved(base, model.adapter)
        return attach(base, OmegaConf.select(self.cfg, key), seed, key)

    def encode(self, row: Row) -> Example:
        """Encode a row with the tokenizer, the template and the maximum length of the run."""
        return encode(self.tokenizer, self.cfg.model.template, row, max_length=self.cfg.data.max_length)

    def iter_padded(self, rows: Sequence[Row]) -> Iterator[Pack]:
        """Yield the rows as padded packs of `evaluate.batch_size` rows."""
        size = self.cfg.evaluate.batch_size
        for start in range(0, len(rows), size):
            yield from pad(self.encode(row) for row in rows[start : start + size])

    def deltas(self, aligned: Model) -> dict[str, Delta]:
        """Return the alignment update of each module.

        Raises:
            UserError: if stage `align` did not run, or fine-tuning continues its adapter.
        """
        if aligned.folder == self.base.folder:
            raise UserError(
                "The alignment update is unknown: stage align did not run, or model.adapters=continued. "
                "Fix: add align to stages (not align=none) and set model.adapters=stacked"
            )
        return low_rank_deltas(aligned.folder / "adapter")


def rows_hash(rows: Sequence[Row]) -> str:
    """Return a hash of the rows and their order."""
    # There may be millions of rows, so that they are hashed one by one and not copied by `astuple`.
    digest, values = sha256(), attrgetter(*(field.name for field in fields(Row)))
    for row in rows:
        digest.update(json.dumps(values(row)).encode() + b"\n")
    return digest.hexdigest()[:16]
