"""Training of an adapter, shared by alignment, fine-tuning and reference adapters. Start at `AdapterTrainer.train`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lightning.pytorch.callbacks import Callback

from lisa_lightning.callbacks.checkpoint import Checkpoint
from lisa_lightning.callbacks.resume_curves import ResumeCurves
from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.evaluation.scores import Metrics
from lisa_lightning.logger.curves_logger import CurvesLogger
from lisa_lightning.logger.run_loggers import RunLoggers
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.model.factors import causal_model
from lisa_lightning.pipeline.fit import fit
from lisa_lightning.trainer.module import LisaModule


@final
@dataclass(frozen=True)
class AdapterTrainer:
    """Trains the adapters of a run, with its checkpoints and loggers."""

    encoder: Encoder
    arguments: Mapping[str, Any]
    """Arguments of Lightning's Trainer."""
    checkpoints: Path
    """Folder of the checkpoints."""
    checkpoint_steps: int
    """Optimizer steps between two checkpoints."""
    loggers: RunLoggers | None
    """Loggers of rank zero; None on the other ranks."""
    checkpoint_activations: bool = False
    """True if the backward pass computes the layers again."""

    def train(
        self,
        stage: str,
        module: LisaModule,
        rows: Mapping[Stream, Sequence[Row]],
        *,
        callbacks: Sequence[Callback] = (),
        curves: bool = True,
        discard: bool = False,
    ) -> Metrics:
        """Train the adapter of a module.

        Args:
            stage: name of the checkpoint and of the curves.
            module: the model, the method and the optimizer settings.
            rows: stream -> rows, for each stream that the method reads.
            callbacks: callbacks that evaluate during training.
            curves: whether to log curves.
            discard: whether alignment steps discard a user batch, as the official code does.

        Returns:
            The cost: `seconds`, `peak_mib`, and the number of `steps`.
        """
        if self.checkpoint_activations:
            checkpoint_activations(causal_model(module.net))
        data = LisaDataModule(
            self.encoder.tokenizer,
            rows.get("user", ()),
            rows.get("alignment", ()),
            rows.get("defender", ()),
            max_length=self.encoder.max_length,
            template=self.encoder.template,
            tokenization=self.encoder.tokenization,
            discard=discard,
        )
        checkpoint = Checkpoint(self.checkpoints / f"{stage}.ckpt", self.checkpoint_steps)
        loggers = self.loggers if curves else None
        resume = ResumeCurves(loggers, stage)
        # Callbacks such as LearningRateMonitor require a logger on every rank.
        other_rank = [CurvesLogger(None, stage)] if curves else []
        stage_loggers = loggers.of_stage(stage) if loggers is not None else other_rank
        steps = fit(module, data, self.arguments, checkpoint, [resume, *callbacks], stage_loggers, stage)
        return {**checkpoint.cost, "steps": steps}

    def export_curves(self, stage: str, folder: Path) -> None:
        """Write the curves of a stage into the folder of its result. Only rank zero has curves."""
        if self.loggers is not None:
            self.loggers.curves.export(stage, folder / "curves.csv")
