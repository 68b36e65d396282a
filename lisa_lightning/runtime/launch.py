"""The processes that share a run: started by Lightning, patient with live ranks, ended together when one is lost."""

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from signal import Signals
from subprocess import Popen
from time import monotonic, sleep
from typing import Any, Final

from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from lisa_lightning.runtime.errors import UserError, first_line
from lisa_lightning.runtime.ranks import OneRank, RankLostError, Ranks

log = logging.getLogger(__name__)

BEAT_S: Final = 1.0
"""Seconds between two signs of life of a rank."""
GRACE_S: Final = 5.0
"""Seconds that a rank has to end by itself after another one is lost."""
START: Final = timedelta(minutes=5)
"""Time that the processes have to start and to connect."""
REPORT_S: Final = 300.0
"""Seconds between two messages about a rank that others wait for."""
CONTINUE: Final = "The same command with its folder and resume=true continues from the last checkpoint"


def first_rank() -> bool:
    """Return whether this process is the first of a run's, as far as is known before they are launched."""
    return getattr(rank_zero_only, "rank", 0) == 0


def fabric_of(cfg: Any) -> Fabric:
    """Return the processes of this run, not yet launched.

    Raises:
        UserError: if this machine lacks the accelerator or the devices.
    """

    def by(strategy: Any) -> Fabric:
        return Fabric(
            accelerator=cfg.accelerator,
            devices=cfg.devices,
            num_nodes=cfg.num_nodes,
            strategy=strategy,
            precision=cfg.precision,
        )

    try:
        fabric = by(cfg.strategy)
        # Ranks that hang are found by `Watch`; this is for those that live and never meet.
        patience = max(START, timedelta(minutes=cfg.timeout_min))
        return by(DDPStrategy(timeout=patience)) if isinstance(fabric.strategy, DDPStrategy) else fabric
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        asked = f"trainer.accelerator={cfg.accelerator}, trainer.devices={cfg.devices}"
        raise UserError(f"{asked} can't be had on this machine: {first_line(error)}") from error


def refuse_processes(fabric: Fabric, cfg: Any) -> None:
    """Raise UserError in a sweep's job if Lightning would start its processes, by running the whole command again."""
    if fabric.world_size > 1 and isinstance(fabric.strategy.launcher, subprocess_script._SubprocessScriptLauncher):
        raise UserError(
            f"trainer.strategy={cfg.strategy} with trainer.devices={cfg.devices} can't run in a sweep: each of its "
            f"{fabric.world_size} processes would start the whole sweep again. Ways out: one device a job "
            "(trainer.strategy=auto trainer.devices=1); a launcher that starts a job's processes itself "
            "(hydra/launcher=submitit_slurm with hydra.launcher.tasks_per_node and gpus_per_node); or one command a job"
        )


@contextmanager
def launched(fabric: Fabric, timeout_min: float) -> Iterator[Ranks]:
    """Launch all ranks and yield them; when one is lost, end the others with a sentence that names it.

    Args:
        timeout_min: minutes that ranks wait for one that gives no sign of life.

    Raises:
        RankLostError: if a rank has ended or hangs.
    """
    if fabric.world_size == 1:
        fabric.launch()
        yield OneRank()
        return
    watch = Watch(fabric, timedelta(minutes=timeout_min))
    try:
        with _observed_by(watch):
            fabric.launch()
        watch.connect()
        yield watch
    except BaseException as error:
        lost = watch.cause(error)
        watch.stop()
        watch.end_children()
        if lost is not None:
            raise lost from error
        raise
    watch.leave()


@contextmanager
def _observed_by(watch: "Watch") -> Iterator[None]:
    """Hand the processes that Lightning starts to `watch`.

    Lightning's own observer kills this process a few seconds after a child's death, before it can say why.
    """
    observer = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = watch.adopt
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = observer


class Watch:
    """Ranks that give signs of life, and wait for one another as long as all of them do.

    A collective alone can't tell a rank that works for hours, as the first one in a repair, from one that is gone.
    Here every rank counts up a number in a store of the first rank. A thread of each rank watches the others' numbers
    and, on the first rank, the processes that it started.

    Args:
        fabric: the processes, not yet launched.
        patience: time without a sign of life after which a rank counts as hanging.
    """

    def __init__(self, fabric: Fabric, patience: timedelta) -> None:
        self.fabric = fabric
        self.patience = patience
        self.rank, self.world = 0, fabric.world_size
        self._children: list[Popen[bytes]] = []
        self._server: TCPStore | None = None
        self._store: TCPStore | None = None
        self._meetings = 0
        self._lost: RankLostError | None = None
        self._stopped = threading.Event()
        self._last_contact = 0.0
        self._beats: dict[int, tuple[int, float]] = {}
        """Rank -> its last count, and when it changed."""

    def adopt(self, children: list["Popen[bytes]"]) -> None:
        """Watch the processes that this rank has started, from before they connect."""
        self._children = children
        threading.Thread(target=self._watch_children, daemon=True).start()

    def connect(self) -> None:
        """Open the store, at a free port of the first rank, and begin to give signs of life."""
        self.rank = self.fabric.global_rank
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.rank == 0:
            self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = int(self.fabric.broadcast(self._server.port if self._server else 0))
        self._store, heartbeat_store = (self._connected(host, port) for _ in range(2))
        self._last_contact = monotonic()
        threading.Thread(target=self._watch_beats, args=(heartbeat_store,), daemon=True).start()
        threading.Thread(target=self._watch_store, daemon=True).start()

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what rank `src` passes, on every rank, however long it takes to get there."""
        self._meet()
        return self.fabric.broadcast(obj, src)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks, as long as they live."""
        self._meet()
        self.fabric.barrier(name)

    def cause(self, error: BaseException) -> UserError | None:
        """Return which rank is lost where that is why this one fails, else None.

        Another rank's own sentence reaches the first one through the store.
        """
        if isinstance(error, RankLostError):
            return None
        if isinstance(error, UserError):
            with suppress(RuntimeError):
                self._opened.set(f"error {self.rank}", str(error))
            return None
        if not isinstance(error, RuntimeError):
            return None
        until = monotonic() + GRACE_S
        while self._lost is None and monotonic() < until:
            sleep(0.1)
        silent = [rank for rank, (_, since) in self._beats.items() if monotonic() - since > 0.8 * GRACE_S]
        if self._lost is None and silent:
            self._lost = self._lost_rank(silent[0], "has ended or hangs")
        if self._lost is None and re.search(r"timed? ?out|connection (closed|reset)", str(error), re.IGNORECASE):
            return UserError(
                f"The ranks have lost contact for trainer.timeout_min={self._minutes} minutes, or for good "
                f"({first_line(error)[:200]}). {CONTINUE}"
            )
        return self._lost

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def end_children(self) -> None:
        """Kill what this rank has started: a process that waits in a collective doesn't see milder signals."""
        for child in self._children:
            child.kill()

    def leave(self) -> None:
        """End a run that went well: the first rank, which holds the store, is the last to leave it."""
        self.stop()
        # A store that is gone means that the first rank has left already.
        with suppress(RuntimeError):
            arrived = self._opened.add("left", 1)
            until = monotonic() + GRACE_S
            while self.is_global_zero and arrived < self.world and monotonic() < until:
                sleep(0.05)
                arrived = self._opened.add("left", 0)

    def _connected(self, host: str, port: int) -> TCPStore:
        """Return a connection to the store; each thread has one."""
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=START)
        store.set_timeout(self.patience)
        return store

    @property
    def _opened(self) -> TCPStore:
        """The store. Raises RuntimeError before `connect`."""
        if self._store is None:
            raise RuntimeError("the ranks have not met")
        return self._store

    def _meet(self) -> None:
        """Wait until all ranks have arrived, unless one of them is lost.

        The first rank may work alone for hours, as in a repair. Another one that lives and doesn't arrive hangs.
        """
        keys = [f"meeting {self._meetings} {rank}" for rank in range(self.world)]
        self._meetings += 1
        since = reported = monotonic()
        pause = 0.002
        store = self._opened
        store.set(keys[self.rank], "")
        while not store.check(keys):
            if self._lost is not None:
                raise self._lost
            sleep(pause)
            pause = min(1.0, 1.5 * pause)
            minutes = (monotonic() - since) / 60
            if monotonic() - reported > REPORT_S and self.rank == 1:
                reported = monotonic()
                log.info("Rank 0 works alone for %.0f minutes now; the others wait.", minutes)
            if 60 * minutes > self.patience.total_seconds():
                missing = [rank for rank in range(1, self.world) if not store.check([keys[rank]])]
                if missing:
                    raise self._lost_rank(
                        missing[0], f"has not arrived for trainer.timeout_min={self._minutes} minutes"
                    )

    def _watch_children(self) -> None:
        while not self._stopped.wait(BEAT_S):
            for rank, child in enumerate(self._children, 1):
                if child.poll():
                    self._lose(rank, _ended(child.returncode) + self._reason(rank))
                    return

    def _watch_beats(self, store: TCPStore) -> None:
        beats = self._beats
        while not self._stopped.wait(BEAT_S):
            try:
                store.add(f"beat {self.rank}", 1)
                counts = {rank: store.add(f"beat {rank}", 0) for rank in range(self.world)}
                departed = store.add("left", 0)
            except RuntimeError:
                self._lose(0, "has ended or hangs")
                return
            now = self._last_contact = monotonic()
            for rank, count in counts.items():
                if rank not in beats or beats[rank][0] != count:
                    beats[rank] = count, now
                elif now - beats[rank][1] > self.patience.total_seconds() and not departed:
                    self._lose(rank, f"gives no sign of life for trainer.timeout_min={self._minutes} minutes")
                    return

    def _watch_store(self) -> None:
        """Watch the store, at which the other thread would wait for ever where the first rank hangs."""
        while not self._stopped.wait(BEAT_S):
            if monotonic() - self._last_contact > self.patience.total_seconds():
                self._lose(0, f"gives no sign of life for trainer.timeout_min={self._minutes} minutes")
                return

    def _reason(self, rank: int) -> str:
        """Return the sentence that a rank ended with, "" where it left none."""
        try:
            has_reason = self._opened.check([f"error {rank}"])
            return f": {self._opened.get(f'error {rank}').decode()}" if has_reason else ""
        except RuntimeError:
            return ""

    @property
    def _minutes(self) -> str:
        return f"{self.patience.total_seconds() / 60:g}"

    def _lost_rank(self, rank: int, description: str) -> RankLostError:
        return RankLostError(
            rank, f"Rank {rank} of {self.world} {description}, so the run ends. {CONTINUE}", by=self.rank
        )

    def _lose(self, rank: int, description: str) -> None:
        """Note which rank is lost. End this process if it doesn't notice, as in a collective that waits for ever."""
        lost = self._lost = self._lost_rank(rank, description)
        if self._stopped.wait(GRACE_S):
            return
        if lost.is_reported:
            print(f"\n{lost}", file=sys.stderr, flush=True)
        self.end_children()
        os._exit(2)


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    signal = Signals(-status).name
    return f"was ended by {signal}" + (" (often: out of memory)" if signal == "SIGKILL" else "")
