"""Safe reference adapter of NLSR, trained by SFT and DPO on refusals and harmful answers. Start at
`reference_adapter`."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from lisa_lightning.config.instances import build
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.validate import plain
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.model.factors import trainable
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_hash
from lisa_lightning.pipeline.stages.train import train
from lisa_lightning.runtime.cache import user_code_hash
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule


def reference_adapter(setting: Setting, aligned: Model) -> tuple[Path, Metrics]:
    """Return the folder of a safe adapter, and the cost of its training.

    It is extrapolated along the line from SFT on alignment rows to DPO:

        dpo + extrapolation * (dpo - sft)

    Args:
        setting: the shared inputs of the stages.
        aligned: the aligned model.
    """
    cfg, seed = setting.cfg.repair.reference, setting.cfg.align.seed
    preferred, rejected = preference_pairs(setting.rows)
    methods = {name: build(plain(cfg[name].method), f"repair.reference.{name}.method") for name in ("sft", "dpo")}
    key = {
        "aligned": aligned.name,
        "reference": plain(cfg),
        "own_code": {name: user_code_hash(method) for name, method in methods.items()},
        "lora": plain(setting.cfg.lora),
        "seed": seed,
        "alignment_rows": rows_hash(setting.rows.alignment),
        "defender_rows": rows_hash(setting.rows.defender),
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(aligned, "lora", seed)

        def train_phase(name: str, rows: dict[Stream, Sequence[Row]]) -> Metrics:
            optim = Optim(**plain(cfg[name].optim)).for_rows(len(rows["alignment"]), setting.fabric.world_size)
            optim_key = f"repair.reference.{name}.optim"
            module = LisaModule(net, methods[name], optim, seed, key=setting.origin | key, optim_key=optim_key)
            return train(setting, f"reference_{name}", module, rows, curves=False)

        costs = [train_phase("sft", {"alignment": setting.rows.alignment})]
        sft = {name: w.detach().clone() for name, w in trainable(net).items()}
        costs.append(train_phase("dpo", {"alignment": preferred, "defender": rejected}))
        if setting.fabric.is_global_zero:
            extrapolated = {n: w.detach().lerp(sft[n], -cfg.extrapolation).cpu() for n, w in trainable(net).items()}
            save_file(extrapolated, folder / "reference.safetensors")
        return {"seconds": sum(c["seconds"] for c in costs), "peak_mib": max(c["peak_mib"] for c in costs)}

    return setting.run_stage("reference", key, make)


def preference_pairs(rows: Rows) -> tuple[list[Row], list[Row]]:
    """Return the refusals and the harmful answers to the same requests, in the same order.

    Raises:
        UserError: if no request has both.
    """
    refusals = {(row.instruction, row.context): row for row in rows.alignment}
    pairs = [(refusals[q], r) for r in rows.defender if (q := (r.instruction, r.context)) in refusals]
    if not pairs:
        raise UserError(
            "repair=nlsr: prefers refusals to harmful answers to the same requests, and source.defender shares no "
            "prompt with source.alignment. Fix: add refusals of the prompts of source.defender to source.alignment"
        )
    preferred, rejected = zip(*pairs, strict=True)
    return list(preferred), list(rejected)
