"""The safe adapter that NLSR repairs by, trained on refusals and against harmful answers to the same requests."""

from collections.abc import Sequence
from pathlib import Path

from hydra.utils import instantiate
from safetensors.torch import save_file

from lisa_lightning.config.validate import plain
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.model.lora import trainable
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_digest
from lisa_lightning.pipeline.stages.train import train
from lisa_lightning.runtime.cache import own_code
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.optim import Optim


def reference_adapter(setting: Setting, aligned: Model) -> tuple[Path, Metrics]:
    """The folder of a safe adapter, extrapolated from plain fine-tuning on alignment rows through DPO."""
    cfg, seed = setting.cfg.repair.reference, setting.cfg.align.seed
    preferred, others = pairs(setting.rows)
    methods = {name: instantiate(cfg[name].method) for name in ("sft", "dpo")}
    key = {
        "aligned": aligned.name,
        "reference": plain(cfg),
        "own_code": {name: own_code(method) for name, method in methods.items()},
        "lora": plain(setting.cfg.lora),
        "seed": seed,
        "alignment_rows": rows_digest(setting.rows.alignment),
        "defender_rows": rows_digest(setting.rows.defender),
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(aligned, "lora", seed)

        def trained(name: str, rows: dict[Stream, Sequence[Row]]) -> Metrics:
            where = f"repair.reference.{name}.optim"
            optim = Optim.of(setting.cfg, where, len(rows["alignment"]), setting.fabric.world_size)
            return train(setting, f"reference_{name}", net, methods[name], optim, seed, rows, key, curves=False)

        costs = [trained("sft", {"alignment": setting.rows.alignment})]
        before = {name: w.detach().clone() for name, w in trainable(net).items()}
        costs.append(trained("dpo", {"alignment": preferred, "defender": others}))
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
