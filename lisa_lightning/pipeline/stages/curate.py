"""Stage `curate`: select the alignment rows of highest score."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from lightning.fabric import Fabric

from lisa_lightning.config.settings import AdapterTraining
from lisa_lightning.curate._progress import Progress
from lisa_lightning.curate.base import Candidates, Selector
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import Packing
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss import choose_packing
from lisa_lightning.objective.loss_scale import LossScale
from lisa_lightning.pipeline.stages.models import ModelSource
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, rows_hash
from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.files import read_json, write_text


def curate(
    cache: StageCache,
    models: ModelSource,
    encoder: Encoder,
    fabric: Fabric,
    selector: Selector,
    settings: AdapterTraining,
    alignment: Sequence[Row],
    defender: Sequence[Row],
    loss_scale: LossScale | None,
    checkpoints: Path,
    checkpoint_steps: int,
) -> tuple[list[Row], Metrics]:
    """Return the alignment rows that a selector keeps, and the cost.

    The scores are cached, so that another share `curate.keep` needs no computation.

    Args:
        cache: the cache of stage results.
        models: loads the base model.
        encoder: encodes the rows.
        fabric: the processes of the run.
        selector: the selector.
        settings: section `align`, whose adapter the selector may train.
        alignment: the candidate rows.
        defender: the provider's harmful rows, for a selector that needs them.
        loss_scale: scale of losses in float16; None in other precisions.
        checkpoints: folder of the file from which an interrupted selection continues.
        checkpoint_steps: steps between two saves of it.
    """
    # A share that keeps no row is refused before the scores are computed.
    selector.count(len(alignment))
    selector_key = class_key(selector)
    del selector_key["settings"]["keep"]
    key = {
        "curate": selector_key,
        "lora": asdict(settings.lora),
        "seed": settings.seed,
        "rows": rows_hash(alignment),
        "defender_rows": rows_hash(defender),
    }

    progress = Progress(checkpoints / "curate.safetensors", short_hash(cache.origin | key), checkpoint_steps)

    def make_model() -> tuple[Backprop, Packing]:
        net = models.attach(models.base, settings.lora, "align.lora", settings.seed).to(fabric.device)
        backprop = Backprop(net, lambda *_: iter(()), loss_scale=loss_scale)
        return backprop, choose_packing(net.get_base_model(), encoder.max_length)

    def make(folder: Path) -> Metrics:
        alignment_examples, defender_examples = (Examples(rows, encoder) for rows in (alignment, defender))
        with fabric.autocast(), no_autocast_cache():
            scores = selector.scores(Candidates(alignment_examples, defender_examples, make_model, progress))
        if fabric.is_global_zero:
            write_text(folder / "scores.json", json.dumps({"scores": scores.float().tolist()}))
        return {}

    folder, cost = cache.run("curate", key, make)
    scores = read_json(folder / "scores.json", f"delete {folder}")["scores"]
    curated = [alignment[i] for i in selector.selected_rows(scores)]
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
