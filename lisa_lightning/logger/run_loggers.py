"""All loggers of a run: curves.csv, W&B, and Lightning loggers of the config group `logger`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, final

from lightning.pytorch.loggers import Logger

from lisa_lightning.logger.curves import CurveRow, Curves, numbers
from lisa_lightning.logger.curves_logger import CurvesLogger
from lisa_lightning.logger.wandb import WandbLogger, WandbRun
from lisa_lightning.runtime.errors import UserError

CONSTANT_METRICS: Final = {"align": ("train/state", "alignment/loss", "proximal/drift")}
"""Stage -> metrics that its curves omit: it has one state, and the anchor does not move."""


@final
class RunLoggers:
    """The curves of a run and its W&B run, with which every stage logs.

    Args:
        out: the output folder of the run.
        wandb_init: arguments of `wandb.init`.
        resumed: whether an earlier run in `out` is continued.
        more: returns further Lightning loggers of a stage.
    """

    def __init__(
        self,
        out: Path,
        wandb_init: dict[str, Any],
        resumed: bool,
        more: Callable[[str], Sequence[Logger]] = lambda stage: (),
    ) -> None:
        self.curves = Curves(out / "curves.csv")
        self.wandb = WandbRun(out, wandb_init, resumed)
        self._more = more
        self._further: dict[str, list[Logger]] = {}

    def of_stage(self, stage: str) -> list[Logger]:
        """Return the loggers of a stage."""
        omitted = CONSTANT_METRICS.get(stage, ())
        self._further[stage] = list(self._more(stage))
        return [
            CurvesLogger(self.curves, stage, omitted),
            WandbLogger(self.wandb, stage, omitted),
            *self._further[stage],
        ]

    def start(self, stage: str, step: int, digest: str) -> None:
        """Start a stage, or continue it after `step` finished steps.

        Later rows of the curves are dropped. Loggers that lack earlier rows get them again.

        Raises:
            UserError: if the curves do not have the rows that the checkpoint was saved with.
        """
        self.curves.drop_after(stage, step or -1)
        if step and self.curves.digest(stage) != digest:
            raise UserError(
                f"{self.curves.path} lacks rows of stage {stage}, or has others, than when step {step} was saved. Fix: "
                f"delete checkpoints/{stage}.ckpt next to it; the stage then starts again"
            )
        rows = self.curves.rows(stage)
        if self.wandb.logged.get(stage, -1) < step:
            self.wandb.log_rows(rows)
        _log_rows(self._further.get(stage, ()), rows)

    def take_over(self, rows: Sequence[CurveRow]) -> None:
        """Log the curves of a stage whose result comes from the cache."""
        if not rows:
            return
        stage = rows[0]["stage"]
        if [numbers(r) for r in self.curves.rows(stage)] != [numbers(r) for r in rows]:
            self.curves.insert(rows)
        self.wandb.log_rows(rows)
        further = self._more(stage)
        _log_rows(further, rows)
        for logger in further:
            logger.finalize("success")


def _log_rows(loggers: Sequence[Logger], rows: Sequence[CurveRow]) -> None:
    for logger in loggers:
        for row in rows:
            logger.log_metrics(numbers(row), int(row["step"]))
