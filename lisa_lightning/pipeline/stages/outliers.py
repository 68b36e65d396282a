"""Stage `outliers`: the user selects rows by their similarity to harmful ones. Start at `select_outliers`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor

from lisa_lightning.attack.base import RowSelector
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.mixing import UserRows
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss_scale import LossScale
from lisa_lightning.objective.similarity import gradient_cosines, mean_cosines
from lisa_lightning.pipeline.stages.models import Model, ModelSource
from lisa_lightning.pipeline.stages.select import embedding_model, prompt_embeddings
from lisa_lightning.pipeline.stages.stage_cache import StageCache, class_key, rows_hash
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import read_json, write_text


def select_outliers(
    cache: StageCache,
    models: ModelSource,
    encoder: Encoder,
    fabric: Fabric,
    aligned: Model,
    attack: RowSelector,
    rows: Rows,
    user: UserRows,
    settings: RunSettings,
) -> tuple[UserRows, Metrics]:
    """Return the user's rows with selected ones in place of the harmless ones, and the cost.

    Rank zero computes representations, which are those of request and answer together. All ranks compute gradients.

    Args:
        cache: the cache of stage results.
        models: loads the aligned model.
        encoder: encodes the rows.
        fabric: the processes of the run.
        aligned: the aligned model.
        attack: the attack.
        rows: all sets of the source.
        user: the rows of `data.n`.
        settings: the settings of the run.

    Raises:
        UserError: if there are too few candidates.
    """
    candidates, references, count = attack.candidates(rows), attack.references(rows), len(user.harmless)
    if count > len(candidates):
        raise UserError(f"data.n={count}: the attack selects from {len(candidates)} rows. Fix: a smaller attack.count")
    key = {
        "aligned": aligned.name,
        "attack": class_key(attack),
        "count": count,
        "rows_together": settings.evaluate.batch_size,
        "rows": {"candidates": rows_hash(candidates), "references": rows_hash(references)},
    }
    if attack.by == "gradient":
        lora = settings.finetune.lora
        key["weights"] = {"lora": lora and asdict(lora), "seed": settings.finetune.seed}

    def similarities() -> Tensor:
        if attack.by == "gradient":
            backprop = _fresh_backprop(models, fabric, aligned, settings)
            with fabric.autocast():
                return gradient_cosines(backprop, map(encoder, candidates), map(encoder, references))
        net, size = embedding_model(models, fabric, aligned), settings.evaluate.batch_size
        with fabric.autocast():
            states = [prompt_embeddings(net, encoder, _with_answers(part), size) for part in (candidates, references)]
        return mean_cosines(*states)

    def make(folder: Path) -> Metrics:
        # A backward pass needs all ranks.
        if attack.by == "gradient" or fabric.is_global_zero:
            indices = attack.select(similarities(), count)
            if fabric.is_global_zero:
                write_text(folder / "rows.json", json.dumps({"rows": indices}))
        return {}

    folder, cost = cache.run("outliers", key, make)
    selected = sorted(read_json(folder / "rows.json", f"delete {folder}")["rows"])
    return UserRows(user.harmful, [candidates[i] for i in selected], user.safe), cost


def _fresh_backprop(models: ModelSource, fabric: Fabric, aligned: Model, settings: RunSettings) -> Backprop:
    """Return the backward passes of the weights that fine-tuning starts from."""
    lora, seed = settings.finetune.lora, settings.finetune.seed
    net: Any = models.unfreeze(aligned) if lora is None else models.attach(aligned, lora, "lora", seed)
    scale = LossScale() if settings.trainer.precision == "16-mixed" else None
    return Backprop(net.to(fabric.device), lambda *_: iter(()), loss_scale=scale)


def _with_answers(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose input ends with the answer, so that both are represented."""
    return [replace(row, context=f"{row.context} {row.response}".strip()) for row in rows]
