"""The user's data set: n rows of which a share p is harmful."""

import numpy as np

from lisa_lightning.data.source import Row, Rows
from lisa_lightning.errors import UserError


def user_rows(rows: Rows, n: int, harmful_ratio: float, order: str, seed: int, safe_rows: int = 0) -> list[Row]:
    """`n` rows, harmful ones first (the interleaving shuffles).

    Args:
        order: `seeded` draws rows at random and counts exactly; `head` takes the first rows and truncates the counts
            in floating point as the official code does (0.9 of 1000 leaves 99 benign rows). Either way a larger
            harmful ratio's harmful rows contain a smaller one's.
        safe_rows: how many of the benign rows give way to alignment rows (the papers' Vlguard baseline).

    Raises:
        UserError: there are fewer rows than asked for.
    """
    if order == "head":
        bad, good = int(harmful_ratio * n), int((1 - harmful_ratio) * n - safe_rows)
    else:
        bad = round(harmful_ratio * n)
        good = n - bad - safe_rows
    if good < 0:
        raise UserError(f"data.safe_rows={safe_rows} is more than the {good + safe_rows} benign rows of data.n={n}")
    wanted = ((bad, rows.harmful, "harmful"), (good, rows.task, "task"), (safe_rows, rows.alignment, "alignment"))
    for count, there, what in wanted:
        if count > len(there):
            raise UserError(
                f"data.n={n} with harmful_ratio={harmful_ratio} and data.safe_rows={safe_rows} needs {count} {what} "
                f"rows; the source has {len(there)}, so one of them must be smaller"
            )
    return [row for i, (count, there, _) in enumerate(wanted, 1) for row in _choose(there, count, order, [seed, i])]


def _choose(rows: list[Row], count: int, order: str, seed: list[int]) -> list[Row]:
    if order == "head":
        return rows[:count]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
