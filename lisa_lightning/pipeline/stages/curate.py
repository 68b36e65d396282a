"""Stage `curate`: select the alignment rows of highest score."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lisa_lightning.config.validate import plain
from lisa_lightning.curate.base import Candidates, Selector
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Packing
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.metrics import Metrics
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss import choose_packing
from lisa_lightning.pipeline.stages.setting import Setting, rows_hash
from lisa_lightning.runtime.cache import user_code_hash
from lisa_lightning.runtime.files import read_json, write_text


def curate(setting: Setting, selector: Selector) -> tuple[list[Row], Metrics]:
    """Return the alignment rows that a selector keeps, and the cost.

    The scores are cached, so that another share `curate.keep` needs no computation.
    """
    cfg, rows = setting.cfg, setting.rows.alignment
    defender = setting.defender_rows(selector)
    # A share that keeps no row is refused before the scores are computed.
    selector.count(len(rows))
    key = {
        "curate": {name: value for name, value in plain(cfg.curate).items() if name != "keep"},
        "own_code": user_code_hash(selector),
        "lora": plain(cfg.align.lora),
        "seed": cfg.align.seed,
        "rows": rows_hash(rows),
        "defender_rows": rows_hash(defender),
    }

    def make_model() -> tuple[Backprop, Packing]:
        net = setting.attach(setting.base, "align.lora", cfg.align.seed).to(setting.fabric.device)
        return Backprop(net, lambda stream, size: iter(())), choose_packing(net.get_base_model(), cfg.data.max_length)

    def make(folder: Path) -> Metrics:
        alignment_examples, defender_examples = (Examples(r, setting.encode) for r in (rows, defender))
        with setting.fabric.autocast(), no_autocast_cache():
            scores = selector.scores(Candidates(alignment_examples, defender_examples, make_model))
        if setting.fabric.is_global_zero:
            write_text(folder / "scores.json", json.dumps({"scores": scores.float().tolist()}))
        return {}

    folder, cost = setting.run_stage("curate", key, make)
    curated = [rows[i] for i in selector.selected_rows(read_json(folder / "scores.json", f"delete {folder}")["scores"])]
    return curated, cost | {"rows/curated": len(curated)}


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Disable autocast's cache of casted weights, which would be outdated after a step changes the weights."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
