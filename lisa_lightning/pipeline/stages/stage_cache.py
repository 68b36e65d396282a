"""The cache of stage results: `StageCache.run`, and parts of their keys such as `class_key`."""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from hashlib import sha256
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from typing import Any, final

from lightning.fabric import Fabric

from lisa_lightning.config.settings import RunSettings
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.logger.curves import read_rows
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.runtime.cache import build_once, package_hash, user_code_hash
from lisa_lightning.runtime.files import read_json, write_text
from lisa_lightning.runtime.memory import peak_memory_mib, reset_peak_memory
from lisa_lightning.runtime.ranks import Ranks


@final
class StageCache:
    """Runs a stage unless the cache has its result.

    Args:
        folder: the cache folder.
        origin: inputs that all stages share, as a part of every cache key.
        fabric: the processes of the run.
        ranks: the same processes for steps in which one rank works alone, possibly for hours.
        loggers: loggers of rank zero; None on the other ranks.
    """

    def __init__(
        self, folder: Path, origin: Mapping[str, Any], fabric: Fabric, ranks: Ranks, loggers: RunLoggers | None
    ) -> None:
        self.folder = folder
        self.origin = dict(origin)
        self._fabric = fabric
        self._ranks = ranks
        self._loggers = loggers

    def run(self, name: str, key: Mapping[str, Any], make: Callable[[Path], Metrics]) -> tuple[Path, Metrics]:
        """Return the result of a stage from the cache, or run the stage.

        Args:
            name: name of the stage, and of its folder in the cache.
            key: inputs of the stage that determine its result, as JSON values.
            make: fills the folder, and is called on every rank if the cache has no result. It returns the cost that
                the last call can't measure: `seconds` and `peak_mib` of an interrupted training.

        Returns:
            The folder of the result, and the cost of the stage when it ran, as metrics.
        """
        device, is_rank_zero, built = self._fabric.device, self._fabric.is_global_zero, False

        def build_result(folder: Path) -> None:
            nonlocal built
            built = True
            started = perf_counter()
            # The peak must not include the garbage of earlier stages and runs.
            gc.collect()
            reset_peak_memory(device)
            cost = make(folder)
            cost = {"seconds": perf_counter() - started, "peak_mib": peak_memory_mib(device)} | cost
            if is_rank_zero:
                write_text(folder / "stage.json", json.dumps(cost))

        folder = build_once(self._ranks, self.folder / name, self.origin | dict(key), build_result)
        if not built and self._loggers is not None and (folder / "curves.csv").exists():
            self._loggers.take_over(read_rows(folder / "curves.csv"))
        cost = read_json(folder / "stage.json", f"delete {folder}")
        steps = {"train/steps": cost["steps"]} if name == "finetune" else {}
        return folder, {f"time/{name}_s": cost["seconds"], f"memory/{name}_mib": cost["peak_mib"]} | steps


def run_origin(settings: RunSettings, base_key: str, fabric: Fabric) -> dict[str, Any]:
    """Return the inputs that all stages of a run share.

    Args:
        settings: the settings of the run.
        base_key: cache key of the base model.
        fabric: the processes of the run.
    """
    model = settings.model
    return {
        "code": package_hash(),
        "device": fabric.device.type,
        "precision": settings.trainer.precision,
        "ranks": fabric.world_size,
        "model": {name: getattr(model, name) for name in ("dtype", "attention", "template", "adapters", "quantize")},
        "base": base_key,
        "max_length": settings.data.max_length,
        "tokenization": settings.data.tokenization,
        **{package: version(package) for package in ("torch", "transformers", "peft", "lightning")},
    }


def class_key(instance: Any) -> dict[str, Any]:
    """Return what determines the behavior of a defense or a task: its class, its settings and the class's code."""
    kind = type(instance)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "settings": asdict(instance),
        "code": user_code_hash(instance),
    }


def stream_hashes(rows: Mapping[Stream, Sequence[Row]]) -> dict[str, str]:
    """Return the hash of the rows of each stream."""
    return {stream: rows_hash(stream_rows) for stream, stream_rows in rows.items()}


def rows_hash(rows: Sequence[Row]) -> str:
    """Return a hash of the rows and their order."""
    # There may be millions of rows, so that they are hashed one by one and not copied by `astuple`.
    digest, values = sha256(), attrgetter(*(field.name for field in fields(Row)))
    for row in rows:
        digest.update(json.dumps(values(row)).encode() + b"\n")
    return digest.hexdigest()[:16]
