"""Verdicts of a run by prompt, read from judged.jsonl. Start at `read_verdicts`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lisa_lightning.runtime.cache import short_hash
from lisa_lightning.runtime.run_files import JUDGED


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Verdicts that a score counts over, in the order of the prompts."""

    prompts: tuple[str, ...]
    """Hash of each prompt. Runs with equal hashes answered the same prompts."""
    hits: tuple[bool, ...]
    """True for each answer that counts."""


VerdictKey = tuple[str, str, str]
"""Judge, model and metric."""


def read_verdicts(folder: Path) -> dict[VerdictKey, Verdicts]:
    """Return the verdicts of a run for each judge, model and metric; {} without judged.jsonl.

    Args:
        folder: folder of the run. Its files are untrusted data.

    Raises:
        UserError: if a line of judged.jsonl is damaged.
    """
    path = folder / JUDGED
    if not path.exists():
        return {}
    # These import torch, which takes longer than all else that a report needs.
    from lisa_lightning.evaluation.judging import Judged, read_judged
    from lisa_lightning.evaluation.metrics import metric_hits

    groups: dict[tuple[str, str], list[Judged]] = {}
    for line in sorted(read_judged(path), key=lambda line: line.index):
        groups.setdefault((line.judge, line.model), []).append(line)
    return {
        (judge, model, metric): Verdicts(
            tuple(short_hash(line.prompt) for line, _ in hits), tuple(hit for _, hit in hits)
        )
        for (judge, model), lines in groups.items()
        for metric, hits in metric_hits(lines).items()
    }


def on_same_prompts(verdicts: Sequence[Verdicts]) -> bool:
    """Return whether all verdicts are on the same prompts in the same order."""
    return len({v.prompts for v in verdicts}) == 1
