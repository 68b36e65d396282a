"""The user's data set: n rows of which a share p is harmful."""

import numpy as np

from lisa_lightning.data.source import Row
from lisa_lightning.errors import UserError


def user_rows(task: list[Row], harmful: list[Row], n: int, harmful_ratio: float, order: str, seed: int) -> list[Row]:
    """`n` rows, harmful ones first (the interleaving shuffles).

    Args:
        order: `seeded` draws rows at random and counts exactly; `head` takes the first rows and truncates the counts
            in floating point as the official code does (0.9 of 1000 leaves 99 benign rows). Either way a larger
            harmful ratio's harmful rows contain a smaller one's.

    Raises:
        UserError: there are fewer rows than asked for.
    """
    if order == "head":
        bad, good = int(harmful_ratio * n), int((1 - harmful_ratio) * n)
    else:
        bad = round(harmful_ratio * n)
        good = n - bad
    for wanted, rows, what in ((bad, harmful, "harmful"), (good, task, "task")):
        if wanted > len(rows):
            raise UserError(
                f"data.n={n} with harmful_ratio={harmful_ratio} needs {wanted} {what} rows; "
                f"the source has {len(rows)}, so data.n or harmful_ratio must be smaller"
            )
    return _choose(harmful, bad, order, [seed, 1]) + _choose(task, good, order, [seed, 2])


def _choose(rows: list[Row], count: int, order: str, seed: list[int]) -> list[Row]:
    if order == "head":
        return rows[:count]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
