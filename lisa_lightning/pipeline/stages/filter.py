"""Stage `filter`: the provider's judges remove user rows before fine-tuning. Start at `filter_rows`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.fabric import Fabric

from lisa_lightning.data.mixing import UserRows
from lisa_lightning.data.source import Row
from lisa_lightning.data.templates import join_context
from lisa_lightning.evaluation.judging import request_verdicts
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.judge.base import Judge, Pair
from lisa_lightning.pipeline.stages.stage_cache import StageCache, rows_hash
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.runtime.files import read_json, write_text


def filter_rows(
    cache: StageCache, fabric: Fabric, filters: Mapping[str, Judge], user: UserRows
) -> tuple[UserRows, Metrics]:
    """Return the user's rows that no judge flags, and the cost with the leak ratio.

    Rank zero judges. Alignment rows that the provider mixes in are not judged.

    Args:
        cache: the cache of stage results, which also has the verdicts of each judge.
        fabric: the processes of the run.
        filters: judges by name.
        user: the rows that the user submits.

    Raises:
        UserError: if a judge fails, or if no row remains.
    """
    key = {
        "filters": {name: judge.version for name, judge in filters.items()},
        "harmful": rows_hash(user.harmful),
        "harmless": rows_hash(user.harmless),
    }

    def make(folder: Path) -> Metrics:
        if fabric.is_global_zero:
            rows = [*user.harmful, *user.harmless]
            flags = [_flags(name, judge, rows, cache.folder) for name, judge in filters.items()]
            removed = [i for i, votes in enumerate(zip(*flags, strict=True)) if any(votes)]
            write_text(folder / "removed.json", json.dumps({"removed": removed}))
        return {}

    folder, cost = cache.run("filter", key, make)
    removed = frozenset(read_json(folder / "removed.json", f"delete {folder}")["removed"])
    harmful = [row for i, row in enumerate(user.harmful) if i not in removed]
    harmless = [row for i, row in enumerate(user.harmless, len(user.harmful)) if i not in removed]
    if not harmful and not harmless:
        raise UserError(
            f"filter={','.join(filters)}: it removes all {len(removed)} rows of the user, so that nothing is left to "
            "train on. Fix: filter=none, another filter or attack, or a smaller harmful_ratio"
        )
    leak = {"filter/leak_ratio": 100 * len(harmful) / len(user.harmful)} if user.harmful else {}
    counts = {"filter/removed": len(removed), "filter/benign_removed": len(user.harmless) - len(harmless)}
    return UserRows(harmful, harmless, user.safe), cost | counts | leak


def _flags(name: str, judge: Judge, rows: Sequence[Row], cache: Path) -> list[bool]:
    """Return whether a judge flags each row. No judge gets the same row twice."""
    pairs = [Pair(join_context(row.instruction, row.context), row.response) for row in rows]
    return [verdict.flagged for verdict in request_verdicts(name, judge, pairs, {}, cache)]
