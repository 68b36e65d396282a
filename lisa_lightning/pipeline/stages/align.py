"""The provider's aligning: LoRA on the alignment rows, merged into the model or kept beside it to go on with."""

from collections.abc import Sequence
from pathlib import Path

from lisa_lightning.config.validate import plain
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.method.base import Method
from lisa_lightning.model.lora import attach_saved, save_adapter, save_merged
from lisa_lightning.pipeline.stages.setting import Model, Setting, rows_digest
from lisa_lightning.pipeline.stages.train import train
from lisa_lightning.runtime.cache import own_code
from lisa_lightning.trainer.optim import Optim


def align(setting: Setting, alignment: list[Row], method: Method) -> tuple[Model, Metrics]:
    """The base model aligned on these rows."""
    cfg, adapters = setting.cfg.align, setting.cfg.model.adapters
    optim = Optim.of(setting.cfg, "align.optim", len(alignment), setting.fabric.world_size)
    rows: dict[Stream, Sequence[Row]] = {"user": [], "alignment": alignment, "defender": setting.defender_rows(method)}
    key = {
        "align": plain(cfg),
        "own_code": own_code(method),
        "rows": rows_digest(alignment),
        "defender_rows": rows_digest(rows["defender"]),
    }

    def make(folder: Path) -> Metrics:
        net = setting.attach(setting.base, "align.lora", cfg.seed)
        cost = train(setting, "align", net, method, optim, cfg.seed, rows, key)
        if setting.fabric.is_global_zero:
            save_adapter(net, str(setting.base.folder), folder / "adapter")
            if adapters == "stacked":
                if setting.cfg.model.quantize is not None:  # 4-bit weights can't take the adapter in
                    net = attach_saved(setting.load(setting.base), folder / "adapter")
                save_merged(net, setting.tokenizer, folder)
            setting.keep_curves("align", folder)
        return cost

    folder, cost = setting.stage("align", key, make)
    model = Model(folder, None) if adapters == "stacked" else Model(setting.base.folder, folder / "adapter")
    return model, cost
