"""The alignment rows that are worth aligning on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lisa_lightning.config.validate import plain
from lisa_lightning.curate.base import Candidates, Curate
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Packing
from lisa_lightning.data.source import Row
from lisa_lightning.evaluate.metrics import Metrics
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.objective.loss import choose_packing
from lisa_lightning.pipeline.stages.setting import Setting, rows_digest
from lisa_lightning.runtime.cache import own_code
from lisa_lightning.runtime.files import read_json, write_text


def curate(setting: Setting, chooser: Curate) -> tuple[list[Row], Metrics]:
    """Those of the provider's alignment rows that `curate` keeps; scores are cached, so another share costs nothing."""
    cfg, rows = setting.cfg, setting.rows.alignment
    defender = setting.defender_rows(chooser)
    chooser.count(len(rows))  # before the long part
    key = {
        "curate": {name: value for name, value in plain(cfg.curate).items() if name != "keep"},
        "own_code": own_code(chooser),
        "lora": plain(cfg.align.lora),
        "seed": cfg.align.seed,
        "rows": rows_digest(rows),
        "defender_rows": rows_digest(defender),
    }

    def trainee() -> tuple[Passes, Packing]:
        net = setting.attach(setting.base, "align.lora", cfg.align.seed).to(setting.fabric.device)
        return Passes(net, lambda stream, size: iter(())), choose_packing(net.get_base_model(), cfg.data.max_length)

    def make(folder: Path) -> Metrics:
        candidates, others = (Examples(r, setting.encode) for r in (rows, defender))
        with setting.fabric.autocast(), cast_anew():
            scores = chooser.scores(Candidates(candidates, others, trainee))
        if setting.fabric.is_global_zero:
            write_text(folder / "scores.json", json.dumps({"scores": scores.float().tolist()}))
        return {}

    folder, cost = setting.stage("curate", key, make)
    curated = [rows[i] for i in chooser.kept(read_json(folder / "scores.json", f"delete {folder}")["scores"])]
    return curated, cost | {"rows/curated": len(curated)}


@contextmanager
def cast_anew() -> Iterator[None]:
    """Within autocast no weight's cast is kept for the next pass, before which a step changes the weight."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
