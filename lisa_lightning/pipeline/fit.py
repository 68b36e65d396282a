"""Train a LisaModule: Lightning's Trainer with this project's callbacks, from a checkpoint if there is one."""

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.progress_bar import StageBar
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.checkpoint_io import AsideCheckpointIO, broken_checkpoint
from lisa_lightning.trainer.module import LisaModule, NotFiniteError


def fit(
    module: LisaModule,
    datamodule: LisaDataModule,
    trainer_cfg: Any,
    checkpoint: Checkpoint,
    callbacks: list[Callback],
    stage: str,
) -> None:
    """Train to the end, from the checkpoint if there is one.

    Raises:
        UserError: a loss that is not finite, a checkpoint of another run, a checkpoint that can't be written.
    """
    trainer = L.Trainer(
        accelerator=trainer_cfg.accelerator,
        devices=trainer_cfg.devices,
        num_nodes=trainer_cfg.num_nodes,
        strategy=trainer_cfg.strategy,
        precision=trainer_cfg.precision,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        plugins=[AsideCheckpointIO()],
        callbacks=[StageBar(stage), *callbacks, checkpoint],
    )
    resume = checkpoint.path if checkpoint.path.exists() else None
    with warnings.catch_warnings():
        # Step batches are built in a millisecond, and the data module resumes them itself.
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        try:
            with _sigterm_left_to_lightning():
                trainer.fit(module, datamodule=datamodule, ckpt_path=resume, weights_only=True)
        except NotFiniteError as error:
            saved = f" The last good checkpoint is {checkpoint.path}." if checkpoint.path.exists() else ""
            raise UserError(f"{error}{saved}") from error
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            if resume is None or checkpoint.restored:
                raise
            raise broken_checkpoint(resume, error) from error
        except SystemExit:
            # Lightning ends so on Ctrl-C. The command says it, as for every other stage.
            if trainer.received_sigterm:
                raise
            raise KeyboardInterrupt from None


@contextmanager
def _sigterm_left_to_lightning() -> Iterator[None]:
    """Let Lightning alone handle SIGTERM: it ends the step first, and the command's own handler would not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
