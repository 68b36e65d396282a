"""Benign outlier: harmless rows that resemble harmful ones in the representations of the aligned model."""

from collections.abc import Mapping
from typing import final

from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn.functional import normalize

from lisa_lightning.attack.base import RowSelector, refuse_other_rows
from lisa_lightning.config.fields import STRICT, Count
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.data.source import Row, Rows


@final
@dataclass(frozen=True, config=STRICT)
class BenignOutlier(RowSelector):
    """Submit the `count` task rows most similar to harmful rows (He et al., COLM 2024, "What is in Your Safe Data?").

    A row's representation is the mean of the last hidden states over the tokens of request and answer. The score is
    the mean cosine to `references` harmful rows of the source. One forward pass for each row.

    Threat model: the user controls the rows, which are all harmless, so that no moderation finds them. The user has
    the aligned model, such as open weights, and some harmful rows. The budget is 100 rows.

    Departures from the paper: it takes the state of the last token, and the best rows for each harmful one. It also
    matches gradients. The references are not part of the data set.
    """

    count: Count = 100
    """Rows of the data set, which sets data.n. The paper has 100."""
    reference_rows: Count = 100
    """Harmful rows to resemble, the first of the source. The paper has 10."""

    def check(self, settings: RunSettings, choices: Mapping[str, str]) -> None:
        """Check that the data set has `count` rows, none of them harmful.

        Raises:
            UserError: if data.n or harmful_ratio has another value.
        """
        refuse_other_rows(settings, "benign_outlier", self.count, "harmless rows", 0)

    def candidates(self, rows: Rows) -> list[Row]:
        """Return all task rows."""
        return rows.train

    def references(self, rows: Rows) -> list[Row]:
        """Return the first harmful rows of the source."""
        return rows.harmful[: self.reference_rows]

    def select(self, candidates: Tensor, references: Tensor, count: int) -> list[int]:
        """Return the indices of the candidates with the highest mean cosine; of equal ones the first."""
        mean = normalize(references.double(), dim=1).mean(0)
        scores = normalize(candidates.double(), dim=1) @ mean
        return scores.argsort(descending=True, stable=True)[:count].tolist()
