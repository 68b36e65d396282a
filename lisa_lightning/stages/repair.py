"""The finished adapter repaired, and the safe adapter that NLSR repairs it by."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from safetensors.torch import load_file, save_file

from lisa_lightning.cache import own_code
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.errors import UserError
from lisa_lightning.module import Optim
from lisa_lightning.net import attach_saved, save_adapter, trainable
from lisa_lightning.repair.repair import Given, Repair, write
from lisa_lightning.schedule import Stream
from lisa_lightning.stages.setting import Metrics, Model, Setting, plain, rows_digest
from lisa_lightning.stages.train import train


def repair(setting: Setting, aligned: Model, tuned: Model, own: Repair) -> tuple[Model, Metrics]:
    """The fine-tuned model with its adapter repaired, by the first rank alone."""
    assert tuned.adapter is not None
    cfg, adapter = setting.cfg.repair, tuned.adapter
    rows = {"defender": setting.defender_rows(own), "alignment": setting.rows.alignment}
    reference, made = _reference(setting, aligned) if "reference" in cfg else (None, {})
    key = {
        "tuned": tuned.name,
        "repair": plain(cfg),
        "own_code": own_code(own),
        "reference": reference.name if reference else "",
        "rows_together": setting.cfg.evaluate.batch_size,  # how `Given.rows` are padded
        **{f"{name}_rows": rows_digest(found) for name, found in rows.items()},
    }

    def make(folder: Path) -> Metrics:
        if setting.fabric.is_global_zero:
            net = attach_saved(setting.load(tuned), adapter).to(setting.fabric.device)
            repaired = own.repair(
                Given(
                    {name: w.detach() for name, w in trainable(net).items()},
                    net=lambda: net,
                    rows=lambda stream: setting.padded(rows[stream]),
                    deltas=lambda: setting.deltas(aligned),
                    reference=lambda: load_file(reference / "reference.safetensors") if reference else {},
                )
            )
            write(trainable(net), repaired.factors)
            save_adapter(net, str(tuned.folder), folder / "adapter")
        return {}

    folder, cost = setting.stage("repair", key, make)
    return Model(tuned.folder, folder / "adapter"), cost | made


def _reference(setting: Setting, aligned: Model) -> tuple[Path, Metrics]:
    """The folder of a safe adapter, extrapolated from plain fine-tuning on alignment rows through DPO."""
    cfg, seed = setting.cfg.repair.reference, setting.cfg.align.seed
    preferred, others = pairs(setting.rows)
    key = {
        "aligned": aligned.name,
        "reference": plain(cfg),
        "lora": plain(setting.cfg.lora),
        "seed": seed,
        "alignment_rows": rows_digest(setting.rows.alignment),
        "defender_rows": rows_digest(setting.rows.defender),
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(aligned, setting.cfg.lora, seed)

        def trained(name: str, own: Any, rows: dict[Stream, Sequence[Row]]) -> Metrics:
            optim = Optim.of(own.optim, len(rows["alignment"]), setting.fabric.world_size)
            method = instantiate(own.method)
            return train(setting, f"reference_{name}", net, method, optim, seed, rows, key, curves=False)

        costs = [trained("sft", cfg.sft, {"alignment": setting.rows.alignment})]
        before = {name: w.detach().clone() for name, w in trainable(net).items()}
        costs.append(trained("dpo", cfg.dpo, {"alignment": preferred, "defender": others}))
        if setting.fabric.is_global_zero:
            further = {n: w.detach().lerp(before[n], -cfg.extrapolation).cpu() for n, w in trainable(net).items()}
            save_file(further, folder / "reference.safetensors")
        return {"seconds": sum(c["seconds"] for c in costs), "peak_mib": max(c["peak_mib"] for c in costs)}

    return setting.stage("reference", key, make)


def pairs(rows: Rows) -> tuple[list[Row], list[Row]]:
    """Refusals and harmful answers to the same requests.

    Raises:
        UserError: there are none.
    """
    refusals = {(row.instruction, row.context): row for row in rows.alignment}
    both = [(refusals[q], r) for r in rows.defender if (q := (r.instruction, r.context)) in refusals]
    if not both:
        raise UserError(
            "repair=nlsr prefers refusals to harmful answers to the same requests, and no prompt of "
            "source.defender is one of source.alignment's"
        )
    preferred, others = zip(*both, strict=True)
    return list(preferred), list(others)
