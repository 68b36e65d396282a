"""The processes that share a run: had from Lightning, patient with one another, ended together."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lisa_lightning.errors import UserError, first_line

LONGEST_WAIT = timedelta(days=1)
"""Of ranks for the first, which may wait for hours for another run's stage, or download, or repair."""


def first_rank() -> bool:
    """Whether this process is the first of a run's, as far as is known before they are launched."""
    return getattr(rank_zero_only, "rank", 0) == 0


def ranks(cfg: Any) -> Fabric:
    """The processes of this run, not yet launched."""

    def by(strategy: Any) -> Fabric:
        return Fabric(
            accelerator=cfg.accelerator,
            devices=cfg.devices,
            num_nodes=cfg.num_nodes,
            strategy=strategy,
            precision=cfg.precision,
        )

    try:
        found = by(cfg.strategy)
        return by(DDPStrategy(timeout=LONGEST_WAIT)) if isinstance(found.strategy, DDPStrategy) else found
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        asked = f"trainer.accelerator={cfg.accelerator}, trainer.devices={cfg.devices}"
        raise UserError(f"{asked} can't be had on this machine: {first_line(error)}") from error


def refuse_processes(fabric: Fabric, cfg: Any) -> None:
    """Raises UserError in a sweep's job if Lightning would start its processes, by running the whole command again."""
    if fabric.world_size > 1 and isinstance(fabric.strategy.launcher, _SubprocessScriptLauncher):
        raise UserError(
            f"trainer.strategy={cfg.strategy} with trainer.devices={cfg.devices} can't run in a sweep: each of its "
            f"{fabric.world_size} processes would start the whole sweep again. Ways out: one device a job "
            "(trainer.strategy=auto trainer.devices=1); a launcher that starts a job's processes itself "
            "(hydra/launcher=submitit_slurm with hydra.launcher.tasks_per_node and gpus_per_node); or one command a job"
        )


@contextmanager
def launched(fabric: Fabric) -> Iterator[None]:
    """All ranks at work; those that the first one started don't outlive its failure, of which they may not hear."""
    fabric.launch()
    try:
        yield
    except BaseException:
        if isinstance(launcher := fabric.strategy.launcher, _SubprocessScriptLauncher):
            for process in launcher.procs:
                process.terminate()
        raise
