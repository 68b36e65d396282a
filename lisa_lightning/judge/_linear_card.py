"""The linear judge's card: what it reaches on rows that it was not fitted on."""

from typing import Any

import numpy as np


def auc(scores: Any, truth: Any) -> float:
    """The area under the ROC curve."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, scores))


def interval(scores: Any, truth: Any, prompts: Any) -> tuple[float, float]:
    """95 %, by drawing prompts with all their answers."""
    chance = np.random.default_rng(0)
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(i)
    groups = list(places.values())
    found = []
    for _ in range(300):
        drawn = [i for g in chance.integers(len(groups), size=len(groups)) for i in groups[g]]
        if 0 < truth[drawn].sum() < len(drawn):
            found.append(auc(scores[drawn], truth[drawn]))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def page(n: dict[str, Any], folds: int) -> str:
    """The card as Markdown, of the numbers that `folds` folds gave."""
    table = "\n".join(
        f"| {r['from']:.1f} | {r['answers']} | {r['said']:.3f} | {r['was']:.3f} |" for r in n["reliability"]
    )
    return f"""# The linear judge

TF-IDF and logistic regression, fitted on `{n["file"]}`: {n["rows"]} answers to {n["prompts"]} prompts,
{100 * n["share_harmful"]:.1f} % of them harmful (SHA-256 of the rows {n["sha256_of_rows"][:16]}…).

All numbers are of answers to prompts that the model was not fitted on ({folds} folds by prompt):

| | |
|---|---|
| area under the ROC curve | {n["auc"]:.3f} (95 % interval {n["auc_low"]:.3f} to {n["auc_high"]:.3f}, drawing prompts) |
| accuracy at 0.5 | {n["accuracy"]:.3f} |
| Brier score | {n["brier"]:.3f} |
| expected calibration error | {n["calibration_error"]:.3f} |

| probability from | answers | said | was |
|---|---|---|---|
{table}

It sees words and how an answer opens, not what it means, and knows the kinds of harm and the models' answers of its
rows. On other models' answers it is worth less than this page says. Version {n["version"]}, scikit-learn
{n["scikit_learn"]}.
"""
