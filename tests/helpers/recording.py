"""Lightning logger that keeps the metrics of every step."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger


class Recording(Logger):
    """Logger that keeps the metrics of each step, without their times."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = {}

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        timeless = {name: value for name, value in metrics.items() if not name.startswith("time/")}
        self.rows.setdefault(step, {}).update(timeless)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def steps(self) -> list[dict[str, float]]:
        """The metrics of each step, in their order."""
        return list(self.rows.values())

    def values(self, name: str = "train/loss") -> list[float]:
        """Return one metric of each step."""
        return [row[name] for row in self.steps]
