"""Stage `align`: the provider trains a LoRA adapter on alignment rows. It is merged, or continued by fine-tuning."""

from collections.abc import Sequence
from pathlib import Path

from lisa_lightning.config.optim import Optim
from lisa_lightning.config.validate import plain
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import attach_saved, save_adapter, save_merged
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_hash
from lisa_lightning.pipeline.stages.train import train
from lisa_lightning.runtime.cache import user_code_hash
from lisa_lightning.trainer.module import LisaModule


def align(setting: Setting, alignment: list[Row], method: Method) -> tuple[Model, Metrics]:
    """Align the base model.

    Args:
        setting: the shared inputs of the stages.
        alignment: the alignment rows.
        method: the alignment method.

    Returns:
        The aligned model and the cost. With model.adapters=stacked the adapter is merged, else it is separate.
    """
    cfg, adapters = setting.cfg.align, setting.cfg.model.adapters
    optim = Optim(**plain(cfg.optim)).for_rows(len(alignment), setting.fabric.world_size)
    rows: dict[Stream, Sequence[Row]] = {"user": [], "alignment": alignment, "defender": setting.defender_rows(method)}
    key = {
        "align": plain(cfg),
        "own_code": user_code_hash(method),
        "rows": rows_hash(alignment),
        "defender_rows": rows_hash(rows["defender"]),
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(setting.base, "align.lora", cfg.seed)
        module = LisaModule(net, method, optim, cfg.seed, key=setting.origin | key, optim_key="align.optim")
        cost = train(setting, "align", module, rows)
        if setting.fabric.is_global_zero:
            save_adapter(net, str(setting.base.folder), folder / "adapter")
            if adapters == "stacked":
                if setting.cfg.model.quantize is not None:
                    # An adapter can't be merged into 4-bit weights.
                    net = attach_saved(setting.load(setting.base), folder / "adapter")
                save_merged(net, setting.tokenizer, folder)
            setting.export_curves("align", folder)
        return cost

    folder, cost = setting.run_stage("align", key, make)
    model = Model(folder, None) if adapters == "stacked" else Model(setting.base.folder, folder / "adapter")
    return model, cost
