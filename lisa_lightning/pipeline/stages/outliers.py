"""Stage `outliers`: the user selects rows by their representations in the aligned model. Start at `select_outliers`."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lightning.fabric import Fabric

from lisa_lightning.attack.base import RowSelector
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.mixing import UserRows
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.evaluation.scores import Metrics
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
    batch_size: int,
) -> tuple[UserRows, Metrics]:
    """Return the user's rows with selected ones in place of the harmless ones, and the cost.

    Rank zero computes the representations. They are those of request and answer together.

    Args:
        cache: the cache of stage results.
        models: loads the aligned model.
        encoder: encodes the rows.
        fabric: the processes of the run.
        aligned: the aligned model.
        attack: the attack.
        rows: all sets of the source.
        user: the rows of `data.n`.
        batch_size: rows of a forward pass.

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
        "rows_together": batch_size,
        "rows": {"candidates": rows_hash(candidates), "references": rows_hash(references)},
    }

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            net = embedding_model(models, fabric, aligned)
            with fabric.autocast():
                candidate_states, reference_states = (
                    prompt_embeddings(net, encoder, _with_answers(part), batch_size)
                    for part in (candidates, references)
                )
            selected = attack.select(candidate_states, reference_states, count)
            write_text(folder / "rows.json", json.dumps({"rows": selected}))
        return {}

    folder, cost = cache.run("outliers", key, make)
    selected = sorted(read_json(folder / "rows.json", f"delete {folder}")["rows"])
    return UserRows(user.harmful, [candidates[i] for i in selected], user.safe), cost


def _with_answers(rows: Sequence[Row]) -> list[Row]:
    """Return rows whose input ends with the answer, so that both are represented."""
    return [replace(row, context=f"{row.context} {row.response}".strip()) for row in rows]
