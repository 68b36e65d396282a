"""Stage `align`: the provider trains a LoRA adapter on alignment rows. It is merged, or continued by fine-tuning."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lisa_lightning.config.settings import AdapterTraining
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import save_adapter
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, stream_hashes
from lisa_lightning.pipeline.stages.train import AdapterTrainer
from lisa_lightning.trainer.module import LisaModule


def align(
    cache: StageCache,
    models: ModelSource,
    trainer: AdapterTrainer,
    fabric: Fabric,
    method: Method,
    settings: AdapterTraining,
    rows: Mapping[Stream, Sequence[Row]],
) -> tuple[Model, Metrics]:
    """Align the base model.

    Args:
        cache: the cache of stage results.
        models: loads the base model.
        trainer: trains the adapter.
        fabric: the processes of the run.
        method: the alignment method.
        settings: section `align`.
        rows: alignment rows and, for a method that needs them, defender rows.

    Returns:
        The aligned model and the cost. With model.adapters=stacked the adapter is merged, else it is separate.
    """
    stacked = models.settings.adapters == "stacked"
    optim = settings.optim.for_rows(len(rows["alignment"]), fabric.world_size)
    key = {"align": asdict(settings), "method": class_key(method), "rows": stream_hashes(rows)}

    def make(folder: Path) -> Metrics:
        net: Any = models.attach(models.base, settings.lora, "align.lora", settings.seed)
        module = LisaModule(net, method, optim, settings.seed, key=cache.origin | key, optim_key="align.optim")
        cost = trainer.train("align", module, rows)
        if fabric.is_global_zero:
            net = module.finish()
            save_adapter(net, str(models.base.folder), folder / "adapter")
            if stacked:
                models.save_merged(net, folder / "adapter", trainer.encoder.tokenizer, folder)
            trainer.export_curves("align", folder)
        return cost

    folder, cost = cache.run("align", key, make)
    return Model(folder) if stacked else Model(models.base.folder, folder / "adapter"), cost
