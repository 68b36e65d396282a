"""Train a `LisaModule` in a stage of a run: `fit`, Lightning's Trainer with checkpoints and a progress bar."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.progress_bar import StageBar
from lisa_lightning.callbacks.stop_signal import StopSignal
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.model.sharding import is_sharded
from lisa_lightning.runtime.errors import NotFiniteError, UserError
from lisa_lightning.runtime.stop import Stopped
from lisa_lightning.trainer.checkpoint_io import AtomicCheckpointIO, broken_checkpoint
from lisa_lightning.trainer.module import LisaModule


def fit(
    module: LisaModule,
    datamodule: LisaDataModule,
    trainer_arguments: Mapping[str, Any],
    checkpoint: Checkpoint,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    stage: str,
) -> int:
    """Train to the end, from the checkpoint if there is one.

    Args:
        module: the model, the method and the optimizer settings.
        datamodule: the rows.
        trainer_arguments: arguments of Lightning's Trainer.
        checkpoint: saves and names the file to resume from.
        callbacks: callbacks that are called before `checkpoint`.
        loggers: loggers of the stage on this rank.
        stage: label of the progress bar.

    Returns:
        The number of finished optimizer steps. A callback may have stopped training early.

    Raises:
        UserError: if a loss is not finite; a checkpoint is of another run or cannot be written; `max_time` is over.
        Stopped: if a signal has stopped training. A checkpoint is saved.
    """
    arguments = dict(trainer_arguments)
    timer = Timer(arguments.pop("max_time", None), verbose=False)
    if is_sharded(module):
        # DDP would copy the frozen weights of rank zero to all ranks.
        arguments["strategy"] = DDPStrategy(init_sync=False)
    bar = [StageBar(stage)] if arguments.get("enable_progress_bar", True) else []
    stop = StopSignal()
    trainer = L.Trainer(
        **({"enable_model_summary": False, "log_every_n_steps": 1} | arguments),
        max_epochs=-1,
        # In a Slurm job Lightning would load any `hpc_ckpt_*.ckpt` of its root, by default the working directory.
        default_root_dir=checkpoint.path.parent,
        logger=list(loggers) or False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[*bar, *callbacks, timer, stop, checkpoint],
    )
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment):
        # Its checkpoint at SIGUSR1 would be a second one, which a later stage of the run would load.
        environment.auto_requeue = False
    _fit(trainer, module, datamodule, checkpoint)
    stop.raise_received()
    steps, total, remaining = trainer.global_step, module.optim.total_steps, timer.time_remaining()
    if steps < total and remaining is not None and remaining <= 0:
        raise UserError(
            f"trainer.max_time={trainer_arguments['max_time']}: stage {stage} stopped after step {steps} of {total}. "
            f"The checkpoint is {checkpoint.path}. Fix: repeat the command with resume=true to continue"
        )
    return steps


def _fit(trainer: L.Trainer, module: LisaModule, datamodule: LisaDataModule, checkpoint: Checkpoint) -> None:
    resume = checkpoint.path if checkpoint.path.exists() else None
    with warnings.catch_warnings():
        # Step batches are built in a millisecond, and the data module resumes them.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        try:
            trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        except NotFiniteError as error:
            saved = f" The last good checkpoint is {checkpoint.path}." if checkpoint.path.exists() else ""
            raise UserError(f"{error}{saved}") from error
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            if resume is None or checkpoint.restored:
                raise
            raise broken_checkpoint(resume, error) from error
        except Stopped:
            raise
        except SystemExit:
            # Lightning exits so on Ctrl-C. The command reports it, as for every other stage.
            raise KeyboardInterrupt from None
