"""Paired differences between the two models of a run, on the same prompts. Start at `read_changes`."""

from pathlib import Path

from lisa_lightning.report.comparisons import format_p
from lisa_lightning.report.run_verdicts import Verdicts, on_same_prompts, read_verdicts
from lisa_lightning.report.score_table import MODELS, format_points


def read_changes(folder: Path) -> dict[tuple[str, str], str]:
    """Return interval and p-value of the change of each score that both models of a run have.

    Args:
        folder: folder of the run, with judged.jsonl and responses.jsonl.

    Returns:
        Pair of metric and judge -> text such as `−15.0 to −1.0, p = 0.01`. The p-value is that of McNemar's exact test.

    Raises:
        UserError: if a line of a file is damaged.
    """
    verdicts = read_verdicts(folder)
    changes = {}
    for judge, model, metric in verdicts:
        before, after = (verdicts.get((judge, name, metric)) for name in MODELS)
        if model == MODELS[0] and before is not None and after is not None and on_same_prompts([before, after]):
            changes[metric, judge] = _describe(before, after)
    return changes


def _describe(before: Verdicts, after: Verdicts) -> str:
    # numpy is imported only where a difference is computed.
    from lisa_lightning.evaluation.paired import mcnemar_exact, paired_difference

    difference = paired_difference([before.hits], [after.hits], before.prompts)
    p = mcnemar_exact(before.hits, after.hits, before.prompts)
    return f"{format_points(difference.low)} to {format_points(difference.high)}, {format_p(p)}"
