"""Benign outlier: harmless rows that resemble harmful ones in representations or gradients of the aligned model."""

from collections.abc import Mapping
from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.attack.base import RowSelector, Similarity, refuse_other_rows
from lisa_lightning.config.fields import STRICT, Count
from lisa_lightning.config.settings import RunSettings
from lisa_lightning.data.source import Row, Rows


@final
@dataclass(frozen=True, config=STRICT)
class BenignOutlier(RowSelector):
    """Submit the `count` task rows most similar to harmful rows (He et al., COLM 2024, "What is in Your Safe Data?").

    - `by=representation`: a row's representation is the mean of the last hidden states over the tokens of request and
      answer. The score is the mean cosine to harmful rows of the source. It costs 1F for each row.
    - `by=gradient`: the score is the cosine of the gradient of a row's loss to the mean gradient of the harmful rows.
      It costs 1F 1B for each row. Two gradients are in memory at a time, and none is stored.

    Threat model: the user controls the rows, which are all harmless, so that no moderation finds them. The user has
    the aligned model, such as open weights, and some harmful rows. The budget is 100 rows.

    Departures from the paper:

    - Representations are means over tokens, not the state of the last token.
    - All references have one score for each row. With representations, the paper takes the best rows of each reference.
    - Gradients are those of the fresh adapter that fine-tuning starts from, or of all weights with `lora=null`. They
      are exact and not projected. The loss counts all tokens of an answer, not only the first ones.
    - There are no safe references, from which the paper's selection by gradients keeps away.
    - The references are not part of the data set.
    """

    count: Count = 100
    """Rows of the data set, which sets data.n. The paper has 100."""
    reference_rows: Count = 100
    """Harmful rows to resemble, the first of the source. The paper has 10."""
    by: Similarity = "representation"
    """Compare rows by `representation` or by `gradient`."""

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
