"""VLGuard: fine-tuning on the user's rows, a share of which is replaced with alignment rows."""

from typing import final

from pydantic.dataclasses import dataclass

from lisa_lightning.config.fields import STRICT, Share
from lisa_lightning.method.base import Method


@final
@dataclass(frozen=True, config=STRICT)
class VLGuard(Method):
    """Fine-tune on a mixed set (Zong et al., ICML 2024, as the baseline of the Lisa paper, section 5.1).

    The set keeps its n rows: alignment rows replace task rows (data/mixing.py). One forward and one backward pass a
    step. With data.order=head the counts are truncated as in the Lisa repository.
    """

    safe_ratio: Share = 0.2
    """Share of the n rows that are alignment rows; 0 is SFT. The papers have 1000 of 5000."""

    @property
    def safe_share(self) -> float:
        """The share of alignment rows, `safe_ratio`."""
        return self.safe_ratio
