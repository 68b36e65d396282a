"""Stage `repair`: repair the fine-tuned adapter."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from lisa_lightning.config.validate import plain
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.model.factors import modules, trainable
from lisa_lightning.model.lora import attach_saved, save_adapter
from lisa_lightning.pipeline.stages.reference import reference_adapter
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_hash
from lisa_lightning.repair.base import Factors, Repair, RepairInputs, set_factors
from lisa_lightning.runtime.cache import user_code_hash
from lisa_lightning.runtime.files import read_json, write_text


def repair(setting: Setting, aligned: Model, finetuned: Model, defense: Repair) -> tuple[Model, Metrics]:
    """Repair the adapter of the fine-tuned model on rank zero.

    Args:
        setting: the shared inputs of the stages.
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        defense: the repair.

    Returns:
        The model with the repaired adapter, and as metrics the cost and the share of changed entries.
    """
    assert finetuned.adapter is not None
    cfg, adapter = setting.cfg.repair, finetuned.adapter
    rows = {"defender": setting.defender_rows(defense), "alignment": setting.rows.alignment}
    reference, reference_cost = reference_adapter(setting, aligned) if "reference" in cfg else (None, {})
    key = {
        "tuned": finetuned.name,
        "repair": plain(cfg),
        "own_code": user_code_hash(defense),
        "reference": reference.name if reference else "",
        # The batch size determines how `RepairInputs.rows` are padded.
        "rows_together": setting.cfg.evaluate.batch_size,
        **{f"{name}_rows": rows_hash(stream_rows) for name, stream_rows in rows.items()},
    }

    def make(folder: Path) -> Metrics:
        if setting.fabric.is_global_zero:
            device = setting.fabric.device
            net = attach_saved(setting.load(finetuned), adapter)
            repaired = defense.repair(
                RepairInputs(
                    {name: w.detach().to(device) for name, w in trainable(net).items()},
                    # The unquantized model is moved to the device only if a repair needs it.
                    net=lambda: net.to(device),
                    rows=lambda stream: setting.iter_padded(rows[stream]),
                    deltas=lambda: {name: delta.to(device) for name, delta in setting.deltas(aligned).items()},
                    reference=lambda: {name: w.to(device) for name, w in _load_factors(reference).items()},
                )
            )
            changes = _count_changes(trainable(net), repaired.factors)
            write_text(folder / "changed.json", json.dumps(changes))
            set_factors(trainable(net), repaired.factors)
            save_adapter(net, str(finetuned.folder), folder / "adapter")
        return {}

    folder, cost = setting.run_stage("repair", key, make)
    changes = read_json(folder / "changed.json", f"delete {folder}")
    return Model(finetuned.folder, folder / "adapter"), cost | reference_cost | changes


def _load_factors(reference: Path | None) -> Factors:
    return load_file(reference / "reference.safetensors") if reference else {}


def _count_changes(original: Mapping[str, Tensor], repaired: Factors) -> Metrics:
    """Return the number of changed modules of an adapter, and the share of its changed entries."""
    differing = {name: int((w != repaired[name].to(w.device)).sum()) for name, w in original.items()}
    changed_modules = sum(any(differing[name] for name in pair) for pair in modules(repaired).values())
    return {
        "repair/modules": changed_modules,
        "repair/entries": sum(differing.values()) / sum(w.numel() for w in original.values()),
    }
