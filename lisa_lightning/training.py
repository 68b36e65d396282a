"""Fitting a LisaModule: Lightning's Trainer with the callbacks that evaluate, record and checkpoint."""

import logging
import os
import signal
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.plugins import TorchCheckpointIO

from lisa_lightning.data.datamodule import LisaDataModule
from lisa_lightning.data.interleave import StepBatches
from lisa_lightning.data.packing import Pack
from lisa_lightning.disk import beside, explained
from lisa_lightning.errors import UserError, first_line, printable
from lisa_lightning.evaluate.evaluator import Evaluator, Question
from lisa_lightning.evaluate.scores import curve_scores
from lisa_lightning.judge.embedded import EmbeddedJudge
from lisa_lightning.loss import completion_loss
from lisa_lightning.memory import peak_mib, watch
from lisa_lightning.module import LisaModule, NotFiniteError
from lisa_lightning.passes import norm
from lisa_lightning.ranks import by_first
from lisa_lightning.schedule import Stream
from lisa_lightning.task.task import Task
from lisa_lightning.tracking import Tracker

log = logging.getLogger(__name__)
SAYS_NOTHING = {"align": ("train/state", "alignment/loss", "proximal/drift")}
"""Of a stage with one state, and no anchor but its start."""
CHECKPOINTED = ("state_dict", "kept", "key", "optimizer_states", "callbacks", "loops", "LisaDataModule", "global_step")
"""Keys of every checkpoint."""
CALLBACK_STATES = {"Checkpoint": {"seconds", "peak_mib"}, "Record": {"rows"}}
"""Keys of each callback's state in a checkpoint."""


class AsideCheckpointIO(TorchCheckpointIO):
    """Checkpoints are written beside their place, then renamed; loading never unpickles."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replace the checkpoint at `path` as one act. Raises UserError where it can't be written."""
        final = Path(path)
        with explained(final):
            final.parent.mkdir(parents=True, exist_ok=True)
        with beside(final) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Return a checkpoint: plain containers and tensors, no bit of which has changed since it was written.

        Raises:
            UserError: if the file is damaged, or is no checkpoint of this project and version of Lightning.
        """
        try:
            # torch doesn't verify the checksums that its own files carry.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{damaged} in it has changed")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            _refuse_no_checkpoint(checkpoint)
        except MemoryError:
            raise
        except Exception as error:
            raise broken_checkpoint(Path(path), error) from error
        return checkpoint


def _refuse_no_checkpoint(checkpoint: Any) -> None:
    """Raise ValueError where the content of a file is not what `fit` can go on from."""
    if not isinstance(checkpoint, dict):
        raise ValueError("it holds no checkpoint")
    if missing := [name for name in CHECKPOINTED if name not in checkpoint]:
        raise ValueError(f"it lacks {missing[0]}")
    for callback, names in CALLBACK_STATES.items():
        if not names <= checkpoint["callbacks"].get(callback, {}).keys():
            raise ValueError(f"it lacks the state of {callback}")
    if (version := checkpoint.get("pytorch-lightning_version")) != L.__version__:
        raise ValueError(f"it was written by Lightning {version}, and this is {L.__version__}")


def broken_checkpoint(path: Path, error: Exception) -> UserError:
    """Return the error for a checkpoint that training can't go on from."""
    reason = printable(first_line(error))[:200]
    return UserError(
        f"{path} can't be used ({type(error).__name__}: {reason}). Fix: delete it; the stage then starts again"
    )


class StageBar(TQDMProgressBar):
    """Lightning's bar, named after the stage: the run is one epoch, so its number says nothing."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Rate and time left of the whole stage."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.stage)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End the bar's line, so that a message starts on one of its own."""
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()


class EvaluateCurve(Callback):
    """Scores on a part of the held-out questions, at the start and every few steps, by the embedded judge."""

    def __init__(
        self, evaluator: Evaluator, judge: EmbeddedJudge, task: Task, asked: list[Question], every: int
    ) -> None:
        self.evaluator = evaluator
        self.judge = judge
        self.task = task
        self.asked = asked
        self.every = every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The point before the first step."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step == 0:
            self._evaluate(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """A point of the curves."""
        assert isinstance(pl_module, LisaModule)
        if trainer.global_step % self.every == 0:
            self._evaluate(pl_module)

    def _evaluate(self, module: LisaModule) -> None:
        answers = self.evaluator.answers(module.net, self.asked, "training")
        scores = curve_scores(self.judge, self.task, answers)
        module.metrics |= {f"eval/{name}": float(value) for name, value in scores.items()}


class JointGradient(Callback):
    """Losses f on alignment rows and h on user rows, and ||grad f + grad h||, at the points of the curves.

    The norm by which the Lisa paper shows that its iterates come to rest (Figures 4 and 5, Theorem 1). Both are means
    over the tokens of fixed rows, spread over each stream, without dropout; every rank measures the same.
    """

    def __init__(self, rows: int, every: int) -> None:
        self.rows = rows
        self.every = every
        self.packs: dict[Stream, tuple[list[Pack], int]] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the rows; the point before the first step."""
        data: Any = trainer
        steps: StepBatches = data.datamodule.steps
        both: tuple[Stream, ...] = ("alignment", "user")
        for state in both:
            examples = steps.streams[state]
            stride = max(1, len(examples) // self.rows)
            chosen = [examples[i] for i in range(0, len(examples), stride)][: self.rows]
            parts = [chosen[i : i + steps.batch_size] for i in range(0, len(chosen), steps.batch_size)]
            packs = [p.to(pl_module.device) for part in parts for p in steps.packing(part)]
            self.packs[state] = packs, max(1, sum(e.supervised for e in chosen))
        if trainer.global_step == 0:
            self._measure(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """A point of the curves."""
        if trainer.global_step % self.every == 0:
            self._measure(pl_module)

    def _measure(self, module: L.LightningModule) -> None:
        assert isinstance(module, LisaModule)
        joint = [torch.zeros_like(w) for w in module.weights]
        module.net.eval()
        with torch.enable_grad():
            for state, (packs, tokens) in self.packs.items():
                total = 0.0
                for pack in packs:  # one at a time, as training does: all of them together may not fit
                    loss = completion_loss(module.net.get_base_model(), [pack]) / tokens
                    total += loss.item()
                    for total_gradient, own in zip(joint, torch.autograd.grad(loss, module.weights), strict=True):
                        total_gradient.add_(own)
                module.metrics[f"eval/{state}_loss"] = total
        module.net.train()
        module.metrics["eval/gradient_norm"] = norm(joint).item()


class Record(Callback):
    """Hands each step's metrics to the tracker, once."""

    def __init__(self, tracker: Tracker | None, stage: str) -> None:
        self.tracker = tracker
        self.stage = stage
        self.rows_at_checkpoint = ""

    def state_dict(self) -> dict[str, Any]:
        """Return a hash of the stage's rows, which are on disk then: no checkpoint outlives its curves."""
        if self.tracker is None:
            return {"rows": ""}
        self.tracker.curves.flush()
        return {"rows": self.tracker.curves.digest(self.stage)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the rows that the checkpoint was written with."""
        self.rows_at_checkpoint = state_dict["rows"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The point before the first step, or the place where the curves go on."""

        def start() -> None:
            if self.tracker is None:
                return
            self.tracker.start(self.stage, trainer.global_step or -1)
            if trainer.global_step and self.tracker.curves.digest(self.stage) != self.rows_at_checkpoint:
                raise UserError(
                    f"{self.tracker.curves.path} lacks rows of stage {self.stage}, or has others, than when step "
                    f"{trainer.global_step} was saved. Fix: delete checkpoints/{self.stage}.ckpt next to it; the stage "
                    "then starts again"
                )

        by_first(trainer.strategy, start)
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """After every optimizer step."""
        assert isinstance(pl_module, LisaModule)
        left_out = SAYS_NOTHING.get(self.stage, ())
        metrics = {name: value for name, value in pl_module.metrics.items() if name not in left_out}

        def record() -> None:
            if self.tracker is not None and metrics:
                self.tracker.log(self.stage, trainer.global_step, metrics)

        by_first(trainer.strategy, record)
        pl_module.metrics = {}


class Checkpoint(Callback):
    """Saves every few steps and after the last, and carries what the stage cost over a resume."""

    def __init__(self, path: Path, every: int, last: int) -> None:
        self.path = path
        self.every = every
        self.last = last
        self.before = {"seconds": 0.0, "peak_mib": 0.0}
        self.started = 0.0
        self.device = torch.device("cpu")
        self.restored = False

    @property
    def cost(self) -> dict[str, float]:
        """Seconds spent on this stage so far and its peak memory in MiB, interrupted runs included."""
        if not self.started:
            return self.before
        seconds = self.before["seconds"] + perf_counter() - self.started
        return {"seconds": seconds, "peak_mib": max(self.before["peak_mib"], peak_mib(self.device))}

    def state_dict(self) -> dict[str, Any]:
        """The cost."""
        return self.cost

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.before = {name: state_dict[name] for name in self.before}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock starts."""
        data: Any = trainer
        if data.datamodule.position != trainer.global_step:
            raise ValueError(f"its data are at step {data.datamodule.position}, its loop at {trainer.global_step}")
        self.restored = True
        if trainer.global_step and trainer.is_global_zero:
            log.info("%s goes on after step %d of %d.", self.path.stem, trainer.global_step, self.last)
        self.started = perf_counter()
        self.device = pl_module.device
        watch(self.device)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Save where it is due; all ranks take part."""
        if trainer.global_step % self.every and trainer.global_step != self.last:
            return
        trouble = None
        try:
            trainer.save_checkpoint(self.path)
        except UserError as error:  # of the first rank, which alone writes
            trouble = str(error)
            trainer.strategy.barrier()  # at which the others wait
        if (trouble := trainer.strategy.broadcast(trouble)) is not None:
            raise UserError(trouble)


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
