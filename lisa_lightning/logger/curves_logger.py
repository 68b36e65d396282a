"""The Lightning logger that writes curves.csv: `CurvesLogger`."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import Logger

from lisa_lightning.logger.curves import Curves


class CurvesLogger(Logger):
    """Writes the metrics of a stage to curves.csv.

    Args:
        curves: the file; None on ranks without one.
        stage: finetune or align.
        omitted: metrics that are constant in this stage.
    """

    def __init__(self, curves: Curves | None, stage: str, omitted: Sequence[str] = ()) -> None:
        super().__init__()
        self.curves = curves
        self.stage = stage
        self.omitted = omitted

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "curves"

    @property
    def version(self) -> str:
        """The stage."""
        return self.stage

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step, given as the number of finished optimizer steps."""
        logged = {name: value for name, value in metrics.items() if name not in self.omitted}
        if self.curves is not None and step is not None and logged:
            self.curves.log(self.stage, step, logged)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml in the run's folder has the settings."""
