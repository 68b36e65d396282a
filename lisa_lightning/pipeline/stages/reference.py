"""Safe reference adapter of a repair, trained by SFT on alignment rows and for NLSR by DPO. Start at
`reference_adapter`."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from lightning.fabric import Fabric
from safetensors.torch import save_file

from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import AdapterTraining, Reference
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.method.base import Method
from lisa_lightning.model.factors import trainable
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, rows_hash
from lisa_lightning.pipeline.stages.train import AdapterTrainer
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule


def reference_adapter(
    cache: StageCache,
    models: ModelSource,
    trainer: AdapterTrainer,
    fabric: Fabric,
    aligned: Model,
    methods: Mapping[str, Method],
    settings: Reference,
    adapter: AdapterTraining,
    rows: Rows,
) -> tuple[Path, Metrics]:
    """Return the folder of a safe adapter, and the cost of its training.

    With a phase of DPO it is extrapolated along the line from SFT on alignment rows to DPO:

        dpo + extrapolation * (dpo - sft)

    Without that phase it is the result of SFT.

    Args:
        cache: the cache of stage results.
        models: loads the aligned model.
        trainer: trains the adapter.
        fabric: the processes of the run.
        aligned: the aligned model.
        methods: the method of each phase, `sft` and, if `settings` has it, `dpo`.
        settings: section `repair.reference`.
        adapter: section `lora` of fine-tuning, with the seed of alignment.
        rows: all sets of the source.
    """
    key = {
        "aligned": aligned.name,
        "reference": asdict(settings),
        "methods": {name: class_key(method) for name, method in methods.items()},
        "lora": asdict(adapter.lora),
        "seed": adapter.seed,
        "alignment_rows": rows_hash(rows.alignment),
        "defender_rows": rows_hash(rows.defender if settings.dpo else []),
    }

    def make(folder: Path) -> Metrics:
        net = models.attach(aligned, adapter.lora, "lora", adapter.seed)

        def train_phase(name: str, phase: Optim, phase_rows: dict[Stream, Sequence[Row]]) -> Metrics:
            optim = phase.for_rows(len(phase_rows["alignment"]), fabric.world_size)
            optim_key = f"repair.reference.{name}.optim"
            module = LisaModule(net, methods[name], optim, adapter.seed, key=cache.origin | key, optim_key=optim_key)
            return trainer.train(f"reference_{name}", module, phase_rows, curves=False)

        costs = [train_phase("sft", settings.sft, {"alignment": rows.alignment})]
        sft = {name: w.detach().clone() for name, w in trainable(net).items()}
        if settings.dpo is not None:
            preferred, rejected = preference_pairs(rows)
            costs.append(train_phase("dpo", settings.dpo, {"alignment": preferred, "defender": rejected}))
        if fabric.is_global_zero:
            weights = trainable(net).items()
            extrapolated = {n: w.detach().lerp(sft[n], -settings.extrapolation).cpu() for n, w in weights}
            save_file(extrapolated, folder / "reference.safetensors")
        return {"seconds": sum(c["seconds"] for c in costs), "peak_mib": max(c["peak_mib"] for c in costs)}

    return cache.run("reference", key, make)


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
