"""Safe rows among the user's: fine-tuning on a set of which a share is alignment rows."""

from typing import final

from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


@final
class VLGuard(Method):
    """Plain fine-tuning on a mixed set (Zong et al., ICML 2024, as the Lisa paper's baseline, section 5.1).

    The set keeps its n rows: alignment rows take the place of task rows (data/mixing.py). One forward and one backward
    pass a step. As in the Lisa repository; with `data.order=head` the counts are truncated as there.

    Args:
        safe_ratio: share of the n rows that are alignment rows, 0..1; 0 is SFT.
    """

    def __init__(self, safe_ratio: float) -> None:
        super().__init__(Schedule(alignment_steps=0, user_steps=1))
        self.safe_ratio = safe_ratio
