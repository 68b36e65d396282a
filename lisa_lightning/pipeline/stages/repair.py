"""The finished adapter repaired."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from lisa_lightning.config.validate import plain
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.model.lora import attach_saved, modules, save_adapter, trainable
from lisa_lightning.pipeline.stages.reference import reference_adapter
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_digest
from lisa_lightning.repair.base import Factors, Given, Repair, write
from lisa_lightning.runtime.cache import own_code
from lisa_lightning.runtime.files import read_json, write_text


def repair(setting: Setting, aligned: Model, tuned: Model, defense: Repair) -> tuple[Model, Metrics]:
    """The fine-tuned model with its adapter repaired, by the first rank alone."""
    assert tuned.adapter is not None
    cfg, adapter = setting.cfg.repair, tuned.adapter
    rows = {"defender": setting.defender_rows(defense), "alignment": setting.rows.alignment}
    reference, made = reference_adapter(setting, aligned) if "reference" in cfg else (None, {})
    key = {
        "tuned": tuned.name,
        "repair": plain(cfg),
        "own_code": own_code(defense),
        "reference": reference.name if reference else "",
        "rows_together": setting.cfg.evaluate.batch_size,  # how `Given.rows` are padded
        **{f"{name}_rows": rows_digest(found) for name, found in rows.items()},
    }

    def make(folder: Path) -> Metrics:
        if setting.fabric.is_global_zero:
            device = setting.fabric.device
            net = attach_saved(setting.load(tuned), adapter)
            repaired = defense.repair(
                Given(
                    {name: w.detach().to(device) for name, w in trainable(net).items()},
                    net=lambda: net.to(device),  # whole, not in 4 bits: only where a repair needs it
                    rows=lambda stream: setting.padded(rows[stream]),
                    deltas=lambda: {name: delta.to(device) for name, delta in setting.deltas(aligned).items()},
                    reference=lambda: {name: w.to(device) for name, w in _loaded(reference).items()},
                )
            )
            changed = _changed(trainable(net), repaired.factors)
            write_text(folder / "changed.json", json.dumps(changed))
            write(trainable(net), repaired.factors)
            save_adapter(net, str(tuned.folder), folder / "adapter")
        return {}

    folder, cost = setting.stage("repair", key, make)
    return Model(tuned.folder, folder / "adapter"), cost | made | read_json(folder / "changed.json", f"delete {folder}")


def _loaded(reference: Path | None) -> Factors:
    return load_file(reference / "reference.safetensors") if reference else {}


def _changed(before: Mapping[str, Tensor], after: Factors) -> Metrics:
    """How many of the adapter's modules, and which share of its entries, are not what they were."""
    differing = {name: int((w != after[name].to(w.device)).sum()) for name, w in before.items()}
    touched = sum(any(differing[name] for name in pair) for pair in modules(after).values())
    return {
        "repair/modules": touched,
        "repair/entries": sum(differing.values()) / sum(w.numel() for w in before.values()),
    }
