"""Mix the user's data set of n rows, of which a share p is harmful: `user_rows` returns `UserRows`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from lisa_lightning.data.source import Row, Rows
from lisa_lightning.runtime.errors import UserError

ALIGNMENT_DRAW: Final = 3
"""Number of the alignment rows among the draws of `user_rows`, a part of their seed."""


@dataclass(frozen=True, slots=True)
class UserRows:
    """The rows that a user submits, and alignment rows that the provider mixes with them."""

    harmful: list[Row]
    harmless: list[Row]
    safe: list[Row] = field(default_factory=list)
    """Alignment rows that replace task rows (method/vlguard.py)."""

    @property
    def all(self) -> list[Row]:
        """All rows, harmful ones first."""
        return [*self.harmful, *self.harmless, *self.safe]


def user_rows(rows: Rows, n: int, harmful_ratio: float, order: str, seed: int, safe_ratio: float = 0.0) -> UserRows:
    """Return the user's rows. They are unshuffled, because `StepBatches` shuffles.

    The harmful rows of a larger harmful ratio contain those of a smaller one.

    Args:
        rows: all rows of the source.
        n: number of rows.
        harmful_ratio: share of harmful rows, 0..1.
        order: `seeded` draws rows at random and rounds the counts. `head` takes the first rows and truncates the counts
            in floating point, as the official code does (0.9 of 1000 leaves 99 benign rows).
        seed: seed of the draw; `head` ignores it.
        safe_ratio: share of alignment rows, 0..1. They replace task rows (method/vlguard.py).

    Raises:
        UserError: if the source has too few rows, or the two ratios sum to more than 1.
    """
    safe = round(safe_ratio * n)
    if order == "head":
        harmful, benign = int(harmful_ratio * n), int((1 - harmful_ratio) * n - safe)
    else:
        harmful = round(harmful_ratio * n)
        benign = n - harmful - safe
    if benign < 0:
        raise UserError(
            f"method.safe_ratio={safe_ratio} and harmful_ratio={harmful_ratio}: together they must be at most 1. "
            "Fix: lower one of them"
        )
    mixture = ((harmful, rows.harmful, "harmful"), (benign, rows.train, "task"), (safe, rows.alignment, "alignment"))
    for count, candidates, kind in mixture:
        if count > len(candidates):
            raise UserError(
                f"data.n={n} with harmful_ratio={harmful_ratio} needs {count} {kind} rows, and the source has "
                f"{len(candidates)}. Fix: data.n={n * len(candidates) // count} or less"
            )
    return UserRows(*(_sample(pool, count, order, [seed, i]) for i, (count, pool, _) in enumerate(mixture, 1)))


def alignment_sample(rows: Rows, order: str, seed: int, count: int) -> list[Row]:
    """Return a sample of alignment rows, the same as those that replace task rows in `user_rows`.

    Args:
        rows: all rows of the source.
        order: `seeded` or `head`.
        seed: seed of the draw; `head` ignores it.
        count: number of rows.

    Raises:
        UserError: if the source has too few rows.
    """
    if count > len(rows.alignment):
        raise UserError(
            f"method.safe_ratio: adds {count} alignment rows, and the source has {len(rows.alignment)}. "
            "Fix: a smaller method.safe_ratio or data.n"
        )
    return _sample(rows.alignment, count, order, [seed, ALIGNMENT_DRAW])


def other_harmful_rows(rows: Rows, user: Sequence[Row], count: int) -> list[Row]:
    """Return the first harmful rows of the source that are not among the user's.

    Args:
        rows: all rows of the source.
        user: the user's rows.
        count: number of rows.

    Raises:
        UserError: if there are too few.
    """
    trained = {(row.instruction, row.context) for row in user}
    others = [row for row in rows.harmful if (row.instruction, row.context) not in trained]
    if count > len(others):
        raise UserError(
            f"evaluate.kl_rows={count}: the source has {len(others)} harmful rows that are not the user's. "
            f"Fix: evaluate.kl_rows={len(others)} or less, or a smaller harmful_ratio or data.n"
        )
    return others[:count]


def _sample(rows: list[Row], count: int, order: str, seed: list[int]) -> list[Row]:
    if order == "head":
        return rows[:count]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))[:count]]
