"""Stage `repair`: repair the fine-tuned adapter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from lisa_lightning.data.encoding import Encoder, iter_padded
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.model.factors import Factors, modules, on_device, trainable
from lisa_lightning.model.lora import attach_saved, replace_adapter, save_adapter
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, stream_hashes
from lisa_lightning.repair.base import Repair, RepairInputs
from lisa_lightning.runtime.files import read_json, write_text


def repair(
    cache: StageCache,
    models: ModelSource,
    encoder: Encoder,
    fabric: Fabric,
    aligned: Model,
    finetuned: Model,
    defense: Repair,
    rows: Mapping[Stream, Sequence[Row]],
    batch_size: int,
    reference: Path | None,
) -> tuple[Model, Metrics]:
    """Repair the adapter of the fine-tuned model on rank zero.

    Args:
        cache: the cache of stage results.
        models: loads the models.
        encoder: encodes the rows.
        fabric: the processes of the run.
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        defense: the repair.
        rows: alignment rows and, for a repair that needs them, defender rows.
        batch_size: rows that are padded together.
        reference: folder of the safe reference adapter; None for a repair without one.

    Returns:
        The model with the repaired adapter, and as metrics the cost and the share of changed entries.
    """
    assert finetuned.adapter is not None
    adapter = finetuned.adapter
    key = {
        "tuned": finetuned.name,
        "repair": class_key(defense),
        "reference": reference.name if reference else "",
        "rows_together": batch_size,
        "rows": stream_hashes(rows),
    }

    def inputs(net: PeftModel) -> RepairInputs:
        device = fabric.device
        config: Any = net.peft_config["default"]
        return RepairInputs(
            {name: w.detach().to(device) for name, w in trainable(net).items()},
            # The unquantized model is moved to the device only if a repair needs it.
            net=lambda: net.to(device),
            rows=lambda stream: iter_padded(rows[stream], encoder, batch_size),
            deltas=lambda: {name: delta.to(device) for name, delta in models.deltas_under(net, aligned).items()},
            alignment=lambda: on_device(device, models.alignment(aligned, config.lora_alpha / config.r)),
            reference=lambda: on_device(device, _load_factors(reference)),
        )

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            net = attach_saved(models.load(finetuned), adapter)
            repaired = defense.repair(inputs(net))
            changes = _count_changes(trainable(net), repaired.factors)
            write_text(folder / "changed.json", json.dumps(changes))
            save_adapter(replace_adapter(net, repaired.factors), str(finetuned.folder), folder / "adapter")
        return {}

    folder, cost = cache.run("repair", key, make)
    changes = read_json(folder / "changed.json", f"delete {folder}")
    return Model(finetuned.folder, folder / "adapter"), cost | changes


def _load_factors(reference: Path | None) -> Factors:
    return load_file(reference / "reference.safetensors") if reference else {}


def _count_changes(original: Mapping[str, Tensor], repaired: Factors) -> Metrics:
    """Return the number of changed modules of an adapter, and the share of its changed entries.

    Entries that the repair has added, by another rank or for other modules, are zero in the original adapter.
    """
    differing = {name: int((w != _padded(original.get(name), w)).sum()) for name, w in repaired.items()}
    changed_modules = sum(any(differing[name] for name in pair) for pair in modules(repaired).values())
    return {
        "repair/modules": changed_modules,
        "repair/entries": sum(differing.values()) / sum(w.numel() for w in repaired.values()),
    }


def _padded(original: Tensor | None, repaired: Tensor) -> Tensor:
    """Return the original factor with zeros up to the shape of the repaired one."""
    padded = torch.zeros_like(repaired)
    if original is not None:
        rows, columns = original.shape
        padded[:rows, :columns] = original.detach()
    return padded
