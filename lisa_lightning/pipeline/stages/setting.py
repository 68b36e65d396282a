"""What every stage works with, and the cache that keeps a stage's result under all that determines it."""

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
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.packing import Example, Pack, pad
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.logger.wandb import Tracker
from lisa_lightning.model.alignment_delta import Delta, low_rank_deltas
from lisa_lightning.model.lora import attach, attach_saved, load, load_tokenizer
from lisa_lightning.runtime.cache import build, cache_folder, code_digest
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import read_json, write_text
from lisa_lightning.runtime.memory import peak_mib, watch
from lisa_lightning.runtime.ranks import Ranks
from lisa_lightning.task.base import Task


@dataclass(frozen=True)
class Model:
    """A model's folder and the adapter on it, if there is one."""

    folder: Path
    adapter: Path | None

    @property
    def name(self) -> list[str]:
        """What it was made from: both lie in folders that are named by a hash of that."""
        return [self.folder.name, self.adapter.parent.name if self.adapter else ""]


@final
class Setting:
    """A run's config, ranks, rows and base model.

    Args:
        cfg: the whole config.
        out: the run's folder.
        ranks: the same processes, where one of them may work alone for hours.
        tracker: of the first rank, None on the others.
        rows: all sets of the source.
        user: the user's rows, harmful ones among them.
        base: the folder of the base model.
        base_key: what it was made from.
    """

    def __init__(
        self,
        cfg: DictConfig,
        out: Path,
        fabric: Fabric,
        ranks: Ranks,
        tracker: Tracker | None,
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
        self.tracker = tracker
        self.task = task
        self.rows = rows
        self.user = user
        self.base = Model(base, None)
        self.cache = cache_folder(cfg.cache_dir)
        self.tokenizer = load_tokenizer(base)
        self.origin: dict[str, Any] = {
            "code": code_digest(),
            "device": fabric.device.type,
            "precision": cfg.trainer.precision,
            "ranks": fabric.world_size,
            "model": {k: cfg.model[k] for k in ("dtype", "attention", "template", "adapters", "quantize")},
            "base": base_key,
            "max_length": cfg.data.max_length,
        }
        """Part of every stage's key."""
        self.origin |= {package: version(package) for package in ("torch", "transformers", "peft", "lightning")}

    def stage(self, name: str, key: dict[str, Any], make: Callable[[Path], Metrics]) -> tuple[Path, Metrics]:
        """The finished folder of a stage, and what it cost when it ran, as metrics.

        Args:
            make: fills the folder, called on every rank if the cache has none; returns what it knows better of its
                cost than its last call can tell: `seconds` and `peak_mib` of a training that was interrupted.
        """
        built = False

        def building(folder: Path) -> None:
            nonlocal built
            built = True
            started = perf_counter()
            gc.collect()  # what earlier stages and runs left behind isn't this one's
            watch(self.fabric.device)
            cost = make(folder)
            cost = {"seconds": perf_counter() - started, "peak_mib": peak_mib(self.fabric.device)} | cost
            if self.fabric.is_global_zero:
                write_text(folder / "stage.json", json.dumps(cost))

        folder = build(self.ranks, self.cache / name, self.origin | key, building)
        if not built and self.tracker is not None and (folder / "curves.csv").exists():
            self.tracker.take_over(read_rows(folder / "curves.csv"))
        cost = read_json(folder / "stage.json", f"delete {folder}")
        return folder, {f"time/{name}_s": cost["seconds"], f"memory/{name}_mib": cost["peak_mib"]}

    def keep_curves(self, name: str, folder: Path) -> None:
        """Put the curves of a stage beside its result; on the first rank."""
        assert self.tracker is not None
        self.tracker.curves.export(name, folder / "curves.csv")

    def defender_rows(self, defense: Defense) -> list[Row]:
        """Defender rows for one that needs them; for others none, so that no result depends on them."""
        return self.rows.defender if "defender rows" in defense.needs else []

    def load(self, model: Model, quantize: bool = False) -> PreTrainedModel:
        """The model without its adapter.

        Args:
            quantize: to the bits of `model.quantize`, for training and generating; a repair needs the weights whole.
        """
        bits = self.cfg.model.quantize if quantize else None
        return load(model.folder, self.cfg.model.dtype, self.cfg.model.attention, bits)

    def attach(self, model: Model, key: str, seed: int) -> PeftModel:
        """The model with the adapter to train: its own, which goes on, or a fresh one as the config has it at `key`."""
        base = self.load(model, quantize=True)
        if model.adapter:
            return attach_saved(base, model.adapter)
        return attach(base, OmegaConf.select(self.cfg, key), seed, key)

    def encode(self, row: Row) -> Example:
        """A row's tokens."""
        return encode(self.tokenizer, self.cfg.model.template, row, max_length=self.cfg.data.max_length)

    def padded(self, rows: Sequence[Row]) -> Iterator[Pack]:
        """Rows as padded packs, as many together as are evaluated together."""
        size = self.cfg.evaluate.batch_size
        for start in range(0, len(rows), size):
            yield from pad(self.encode(row) for row in rows[start : start + size])

    def deltas(self, aligned: Model) -> dict[str, Delta]:
        """What aligning changed.

        Raises:
            UserError: there was no aligning, or its adapter goes on being trained.
        """
        if aligned.folder == self.base.folder:
            raise UserError(
                "What aligning changed can't be told: the stage align did not run (stages, align=none), or its adapter "
                "went on into fine-tuning (model.adapters=continued)"
            )
        return low_rank_deltas(aligned.folder / "adapter")


def rows_digest(rows: Sequence[Row]) -> str:
    """A hash of rows and their order."""
    found, content = sha256(), attrgetter(*(field.name for field in fields(Row)))
    for row in rows:  # one at a time, and without copies by astuple: there may be millions
        found.update(json.dumps(content(row)).encode() + b"\n")
    return found.hexdigest()[:16]
