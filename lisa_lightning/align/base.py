"""The interface of a defense at alignment: `Aligner`, a method that trains on alignment rows."""

from lisa_lightning.data.schedule import Schedule
from lisa_lightning.method.base import Method


class Aligner(Method):
    """A training-time defense at alignment. Without overrides it is SFT on the alignment rows."""

    @property
    def schedule(self) -> Schedule:
        """Alignment steps only."""
        return Schedule(alignment_steps=1, user_steps=0)
