"""Adapter that the user supplies: `read_supplied` reads it, and `adopt` makes it a cached result as training does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lightning.fabric import Fabric

from lisa_lightning.config.requirements import is_adapter_folder
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.model.base_model import locate_weights
from lisa_lightning.model.lora import attach_saved, load_tokenizer
from lisa_lightning.model.lora_folder import LoraAdapter, read_lora, save_plain
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache
from lisa_lightning.runtime.errors import UserError, printable

PLAIN: Final = "train a plain LoRA adapter (no DoRA, no rank_pattern, no modules_to_save) and name its folder"
"""Fix for an adapter that no repair handles."""


@dataclass(frozen=True)
class Supplied:
    """An adapter that the user supplies, and the aligned model that it belongs on."""

    adapter: LoraAdapter
    alignment: LoraAdapter | None = None
    """Alignment adapter on the base model, if `aligned` names one."""
    aligned_folder: Path | None = None
    """Folder of the aligned model, if `aligned` names a whole model."""
    aligned_version: Any = None
    """JSON value that identifies the content of that folder."""

    @property
    def aligned_key(self) -> dict[str, Any]:
        """Part of every cache key: the content of a whole aligned model, {} without one."""
        return {} if self.aligned_folder is None else {"aligned": [str(self.aligned_folder), self.aligned_version]}

    @property
    def contents(self) -> list[Any]:
        """JSON values that identify the adapter and the aligned model."""
        return [self.adapter.content, self.alignment and self.alignment.content, self.aligned_key]

    def served_folder(self, base: Path) -> Path:
        """Return the folder of the model whose tokenizer the prompts need.

        Args:
            base: folder of the base model.
        """
        return self.aligned_folder or base


def read_supplied(settings: RunSettings) -> Supplied | None:
    """Read the adapter and locate the aligned model, which may be fetched from the hub. No model is loaded.

    Returns:
        None without config key `adapter`.

    Raises:
        UserError: if the adapter is no plain LoRA adapter, or there is no such aligned model.
    """
    if settings.adapter is None:
        return None
    adapter = _read("adapter", settings.adapter)
    if settings.aligned is None:
        return Supplied(adapter)
    if is_adapter_folder(settings.aligned):
        return Supplied(adapter, alignment=_read("aligned", settings.aligned))
    folder, version = locate_weights(f"aligned={settings.aligned}", settings.aligned, None)
    return Supplied(adapter, aligned_folder=folder, aligned_version=version)


def _read(key: str, name: str) -> LoraAdapter:
    """Read the adapter that a config key names."""
    error_prefix = f"{key}={printable(name)}"
    try:
        folder = Path(name).expanduser().absolute()
        if folder.is_dir():
            return read_lora(folder, error_prefix, PLAIN)
    except (OSError, RuntimeError, ValueError):
        # A name that is too long, holds a NUL, or begins with an unknown `~user` names no folder.
        pass
    raise UserError(f"{error_prefix}: there is no such folder. Fix: name the folder of an adapter")


def refuse_other_base(settings: RunSettings, supplied: Supplied, base: Path) -> None:
    """Check that the adapters name the model that the config puts them on.

    The aligned model of an alignment adapter has no name of its own. So an adapter on it is not checked.

    Args:
        settings: the settings of the run.
        supplied: the adapter and the aligned model.
        base: folder of the base model.

    Raises:
        UserError: if an adapter names another model.
    """
    model_id = settings.model.id or str(base)
    if supplied.alignment is not None:
        _refuse_other_name(f"aligned={settings.aligned}", supplied.alignment, "model.id", model_id, base)
    elif supplied.aligned_folder is not None:
        aligned = str(settings.aligned)
        _refuse_other_name(f"adapter={settings.adapter}", supplied.adapter, "aligned", aligned, supplied.aligned_folder)
    else:
        _refuse_other_name(f"adapter={settings.adapter}", supplied.adapter, "model.id", model_id, base)


def _refuse_other_name(error_prefix: str, adapter: LoraAdapter, key: str, name: str, folder: Path) -> None:
    """Raise UserError if an adapter's config names neither this model nor, in another place, one of its name."""
    stated = adapter.base
    if stated is None or stated in (name, str(folder)):
        return
    try:
        path = Path(stated).expanduser()
        is_same = path.resolve() == folder.resolve() if path.exists() else path.name in (Path(name).name, folder.name)
    except (OSError, RuntimeError, ValueError):
        is_same = False
    if not is_same:
        raise UserError(
            f"{error_prefix}: it was trained on {printable(stated)[:200]}, and {key} is {name}. Fix: set {key} to that "
            "model, or correct base_model_name_or_path in a copy of its adapter_config.json"
        )


def adopt(cache: StageCache, models: ModelSource, fabric: Fabric, supplied: Supplied) -> tuple[Model, Model]:
    """Return the aligned model, and that model with the adapter. Both are results in the cache.

    An alignment adapter is merged, as the stage align does. The user's folders are only read.

    Args:
        cache: the cache of stage results.
        models: loads the base model.
        fabric: the processes of the run.
        supplied: the adapter and the aligned model.
    """
    aligned = models.base if supplied.aligned_folder is None else Model(supplied.aligned_folder)
    if supplied.alignment is not None:
        aligned = Model(_merge(cache, models, fabric, supplied.alignment))
    key = {"adapter": supplied.adapter.content, "on": aligned.name}
    folder = _store(cache, fabric, "adapter", key, lambda out: save_plain(supplied.adapter, aligned.folder, out))
    return aligned, Model(aligned.folder, folder / "adapter")


def _merge(cache: StageCache, models: ModelSource, fabric: Fabric, alignment: LoraAdapter) -> Path:
    """Return the folder of the base model with the merged alignment adapter, and of that adapter in it."""

    def save(adapter: Path) -> None:
        save_plain(alignment, models.base.folder, adapter)
        net = attach_saved(models.load(models.base), adapter)
        models.save_merged(net, adapter, load_tokenizer(models.base.folder), adapter.parent)

    return _store(cache, fabric, "aligned", {"alignment": alignment.content}, save)


def _store(cache: StageCache, fabric: Fabric, name: str, key: Mapping[str, Any], save: Any) -> Path:
    """Return the folder of a result in the cache, in which rank zero saves an adapter first."""

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            save(folder / "adapter")
        return {}

    # The cost is that of a copy, which no report shows.
    return cache.run(name, key, make)[0]
