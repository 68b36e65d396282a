"""Card of the linear judge: its quality on held-out rows. Start at `card_markdown`."""

from typing import Any

import numpy as np


def auc(scores: Any, truth: Any) -> float:
    """Return the area under the ROC curve.

    Args:
        scores: [rows], larger for harmful rows.
        truth: [rows] bool; True for harmful rows.
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores))


def auc_interval(scores: Any, truth: Any, prompts: Any) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the AUC; each sample draws prompts with all their answers.

    Args:
        scores: [rows], larger for harmful rows.
        truth: [rows] bool; True for harmful rows.
        prompts: [rows] request of each row.
    """
    rng = np.random.default_rng(0)
    rows_by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        rows_by_prompt.setdefault(prompt, []).append(i)
    groups = list(rows_by_prompt.values())
    sampled_aucs = []
    for _ in range(300):
        sample = [i for g in rng.integers(len(groups), size=len(groups)) for i in groups[g]]
        if 0 < truth[sample].sum() < len(sample):
            sampled_aucs.append(auc(scores[sample], truth[sample]))
    low, high = np.quantile(sampled_aucs, (0.025, 0.975))
    return float(low), float(high)


def card_markdown(n: dict[str, Any], folds: int) -> str:
    """Return the card as Markdown.

    Args:
        n: `LinearJudge.numbers`.
        folds: number of folds in which the numbers were measured.
    """
    table = "\n".join(
        f"| {r['from']:.1f} | {r['answers']} | {r['said']:.3f} | {r['was']:.3f} |" for r in n["reliability"]
    )
    return f"""# The linear judge

TF-IDF and logistic regression, fitted on `{n["file"]}`: {n["rows"]} answers to {n["prompts"]} prompts,
{100 * n["share_harmful"]:.1f} % of them harmful (SHA-256 of the rows {n["sha256_of_rows"][:16]}…).

All numbers are measured on held-out prompts ({folds} folds by prompt):

| | |
|---|---|
| area under the ROC curve | {n["auc"]:.3f} (95 % interval {n["auc_low"]:.3f} to {n["auc_high"]:.3f} by prompt) |
| accuracy at 0.5 | {n["accuracy"]:.3f} |
| Brier score | {n["brier"]:.3f} |
| expected calibration error | {n["calibration_error"]:.3f} |

| probability from | answers | mean probability | share harmful |
|---|---|---|---|
{table}

Its features are words and the opening of an answer, not its meaning. It covers the kinds of harm and the models of its
rows. On answers of other models its quality is lower than these numbers. Version {n["version"]}, scikit-learn
{n["scikit_learn"]}.
"""
