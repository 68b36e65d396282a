"""The user's data set: n rows of which a share p is harmful."""

import numpy as np

from lisa_lightning.data.source import Row, Rows
from lisa_lightning.runtime.errors import UserError


def user_rows(rows: Rows, n: int, harmful_ratio: float, order: str, seed: int, safe_ratio: float = 0.0) -> list[Row]:
    """`n` rows, harmful ones first (the interleaving shuffles).

    Args:
        order: `seeded` draws rows at random and counts exactly; `head` takes the first rows and truncates the counts
            in floating point as the official code does (0.9 of 1000 leaves 99 benign rows). Either way a larger
            harmful ratio's harmful rows contain a smaller one's.
        safe_ratio: share of the n rows that are alignment rows, in place of task rows (method/vlguard.py).

    Raises:
        UserError: there are fewer rows than asked for.
    """
    safe = round(safe_ratio * n)
    if order == "head":
        bad, good = int(harmful_ratio * n), int((1 - harmful_ratio) * n - safe)
    else:
        bad = round(harmful_ratio * n)
        good = n - bad - safe
    if good < 0:
        raise UserError(
            f"method.safe_ratio={safe_ratio} and harmful_ratio={harmful_ratio}: together they must be at most 1"
        )
    wanted = ((bad, rows.harmful, "harmful"), (good, rows.train, "task"), (safe, rows.alignment, "alignment"))
    for count, there, what in wanted:
        if count > len(there):
            raise UserError(
                f"data.n={n} with harmful_ratio={harmful_ratio} needs {count} {what} rows, and the source has "
                f"{len(there)}; data.n={n * len(there) // count} is the most"
            )
    return [row for i, (count, there, _) in enumerate(wanted, 1) for row in _choose(there, count, order, [seed, i])]


def _choose(rows: list[Row], count: int, order: str, seed: list[int]) -> list[Row]:
    if order == "head":
        return rows[:count]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
