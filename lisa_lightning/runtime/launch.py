"""Processes of a run: `make_fabric` and `launch_ranks` start them, and `Watch` detects a lost rank.

Ranks wait for one another as long as all are alive. If one is lost, all others end.
"""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from signal import Signals
from subprocess import Popen
from time import monotonic, sleep
from typing import Any, Final

import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers import subprocess_script
from torch.distributed import (
    DistError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
    distributed_c10d,
)

from lisa_lightning.runtime.errors import UserError, first_line
from lisa_lightning.runtime.ranks import OneRank, RankLostError, Ranks

log = logging.getLogger(__name__)

BEAT_S: Final = 1.0
"""Seconds between two heartbeats of a rank."""
GRACE_S: Final = 5.0
"""Seconds until a rank is ended after another one is lost, if it has not ended by itself."""
START_TIMEOUT: Final = timedelta(minutes=5)
"""Time limit for the processes to start and connect."""
REPORT_S: Final = 300.0
"""Seconds between two log messages about a rank that others wait for."""
REFUSED: Final = "refused"
"""Key of the store: the last rank that has ended with a UserError."""
CONTINUE_HINT: Final = (
    "Fix: repeat the command with its folder and resume=true, which continues from the last checkpoint"
)


def make_fabric(settings: Any) -> Fabric:
    """Return the Fabric of this run's processes, which are not launched yet.

    Args:
        settings: section `trainer`.

    Raises:
        UserError: if this machine lacks the accelerator or the devices, the precision needs a GPU, or the launcher has
            started more nodes than the run has.
    """
    node = os.environ.get("NODE_RANK", "0")
    if "RANK" not in os.environ and int(node) >= settings.num_nodes:
        raise UserError(
            f"NODE_RANK={node} is set, and trainer.num_nodes={settings.num_nodes} has no such node. "
            f"Fix: trainer.num_nodes={int(node) + 1} or more, or unset NODE_RANK"
        )

    def with_strategy(strategy: Any) -> Fabric:
        return Fabric(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy,
            precision=settings.precision,
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")
            fabric = with_strategy(settings.strategy)
        if settings.precision == "16-mixed" and fabric.device.type == "cpu":
            # Lightning would compute in bfloat16 instead.
            raise UserError(
                "trainer.precision=16-mixed: float16 needs a GPU, and this run is on the CPU. Fix: "
                "trainer.precision=bf16-mixed or 32-true"
            )
        # Collectives get `trainer.timeout_min` once all ranks have met.
        return with_strategy(DDPStrategy(timeout=START_TIMEOUT)) if isinstance(fabric.strategy, DDPStrategy) else fabric
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        raise UserError(
            f"trainer.accelerator={settings.accelerator}, trainer.devices={settings.devices}: not available on this "
            f"machine ({first_line(error)}). Fix: use trainer.accelerator=auto, or fewer devices"
        ) from error


def refuse_processes(fabric: Fabric, settings: Any) -> None:
    """Raise UserError in a job of a sweep if Lightning would start its processes by repeating the whole command."""
    if fabric.world_size > 1 and isinstance(fabric.strategy.launcher, subprocess_script._SubprocessScriptLauncher):
        raise UserError(
            f"trainer.strategy={settings.strategy} with trainer.devices={settings.devices} can't run in a sweep: each "
            f"of its {fabric.world_size} processes would start the whole sweep again. Fix: use one device a job "
            "(trainer.strategy=auto trainer.devices=1); a launcher that starts a job's processes itself "
            "(hydra/launcher=submitit_slurm with hydra.launcher.tasks_per_node and gpus_per_node); or one command a job"
        )


@contextmanager
def launch_ranks(fabric: Fabric, timeout_min: float) -> Iterator[Ranks]:
    """Launch all ranks and yield them. If one is lost, end the others with a message that names it.

    Args:
        fabric: the processes, before their launch.
        timeout_min: minutes that ranks wait for a rank without heartbeats.

    Raises:
        RankLostError: if a rank has ended or hangs.
    """
    if fabric.world_size == 1:
        fabric.launch()
        yield OneRank()
        return
    watch = Watch(fabric, timedelta(minutes=timeout_min))
    try:
        with _observe_children(watch):
            _meet(fabric)
        if torch.distributed.is_initialized():
            # `Watch` detects ranks that hang. This timeout is for ranks that are alive and never meet.
            distributed_c10d._set_pg_timeout(max(START_TIMEOUT, watch.timeout))
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


def _meet(fabric: Fabric) -> None:
    """Launch the ranks, and wait until all have connected.

    Raises:
        UserError: if some have not connected within `START_TIMEOUT`.
    """
    try:
        fabric.launch()
    except (DistError, TimeoutError) as error:
        minutes = START_TIMEOUT.total_seconds() / 60
        raise UserError(
            f"The {fabric.world_size} processes of the run have not met within {minutes:g} minutes "
            f"({first_line(error)[:200]}). Fix: start the same command on every node, with MASTER_ADDR and MASTER_PORT "
            "of the first, and see whether another node reports an error"
        ) from error


@contextmanager
def _observe_children(watch: "Watch") -> Iterator[None]:
    """Let `watch` observe the processes that Lightning starts.

    Lightning's observer kills this process a few seconds after the end of a child, before it can report the cause.
    """
    observer = subprocess_script._launch_process_observer
    subprocess_script._launch_process_observer = watch.adopt
    try:
        yield
    finally:
        subprocess_script._launch_process_observer = observer


class Watch:
    """Ranks with heartbeats, which wait for one another as long as all are alive.

    A collective can't distinguish a rank that works for hours, as rank zero in a repair, from a lost one. So each rank
    increments a counter in a store on rank zero. A thread of each rank watches the counters of the others. On rank zero
    it watches the started processes too.

    Args:
        fabric: the processes, before their launch.
        timeout: time without a heartbeat after which a rank counts as hanging.
    """

    def __init__(self, fabric: Fabric, timeout: timedelta) -> None:
        self.fabric = fabric
        self.timeout = timeout
        self.rank, self.world_size = 0, fabric.world_size
        self._children: list[Popen[bytes]] = []
        self._server: TCPStore | None = None
        self._store: TCPStore | None = None
        self._meetings = 0
        self._lost: RankLostError | None = None
        self._stopped = threading.Event()
        self._last_contact = 0.0
        self._beats: dict[int, tuple[int, float]] = {}
        """Rank -> its last count, and the time of its last change."""

    def adopt(self, children: list["Popen[bytes]"]) -> None:
        """Watch the processes that this rank has started, even before they connect."""
        self._children = children
        threading.Thread(target=self._watch_children, daemon=True).start()

    def connect(self) -> None:
        """Open the store at a free port of rank zero, and start the heartbeats."""
        self.rank = self.fabric.global_rank
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if self.rank == 0:
            self._server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port = int(self.fabric.broadcast(self._server.port if self._server else 0))
        # Each thread needs a connection.
        self._store, heartbeat_store = (self._connect_store(host, port) for _ in range(2))
        self._last_contact = monotonic()
        threading.Thread(target=self._watch_beats, args=(heartbeat_store,), daemon=True).start()
        threading.Thread(target=self._watch_store, daemon=True).start()

    @property
    def is_global_zero(self) -> bool:
        """True if this process is rank zero."""
        return self.rank == 0

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src` on every rank, after a wait of any length for that rank."""
        self._wait_for_all()
        return self.fabric.broadcast(obj, src)

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks, as long as they are alive."""
        self._wait_for_all()
        self.fabric.barrier(name)

    def cause(self, error: BaseException) -> UserError | None:
        """Return the error of the lost rank that made this one fail with `error`, or None if none did.

        A UserError of another rank reaches rank zero through the store.
        """
        if isinstance(error, RankLostError):
            return None
        if isinstance(error, UserError):
            with suppress(RuntimeError):
                self._connected_store.set(f"error {self.rank}", str(error))
                self._connected_store.set(REFUSED, str(self.rank))
            return None
        if not isinstance(error, RuntimeError):
            return None
        deadline = monotonic() + GRACE_S
        while self._lost is None and monotonic() < deadline:
            sleep(0.1)
        silent = [rank for rank, (_, changed_s) in self._beats.items() if monotonic() - changed_s > 0.8 * GRACE_S]
        if self._lost is None and silent:
            self._lost = self._make_error(silent[0], "has ended or hangs")
        if self._lost is None and re.search(r"timed? ?out|connection (closed|reset)", str(error), re.IGNORECASE):
            return UserError(
                f"The ranks have lost contact for trainer.timeout_min={self._minutes} minutes, or for good "
                f"({first_line(error)[:200]}). {CONTINUE_HINT}"
            )
        return self._lost

    def stop(self) -> None:
        """Stop watching."""
        self._stopped.set()

    def end_children(self) -> None:
        """Kill the processes that this rank has started. In a collective they ignore milder signals."""
        for child in self._children:
            child.kill()

    def leave(self) -> None:
        """End a successful run. Rank zero, which holds the store, leaves last."""
        self.stop()
        # A missing store means that rank zero has left already.
        with suppress(RuntimeError):
            departed = self._connected_store.add("left", 1)
            deadline = monotonic() + GRACE_S
            while self.is_global_zero and departed < self.world_size and monotonic() < deadline:
                sleep(0.05)
                departed = self._connected_store.add("left", 0)

    def _connect_store(self, host: str, port: int) -> TCPStore:
        """Return a new connection to the store."""
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=START_TIMEOUT)
        store.set_timeout(self.timeout)
        return store

    @property
    def _connected_store(self) -> TCPStore:
        """The store. Raises RuntimeError before `connect`."""
        if self._store is None:
            raise RuntimeError("the ranks have not met")
        return self._store

    def _wait_for_all(self) -> None:
        """Wait until all ranks have arrived. Raise RankLostError if one is lost.

        Rank zero may work alone for hours, as in a repair. Any other rank that is alive and doesn't arrive hangs.
        """
        keys = [f"meeting {self._meetings} {rank}" for rank in range(self.world_size)]
        self._meetings += 1
        start = reported = monotonic()
        pause = 0.002
        store = self._connected_store
        store.set(keys[self.rank], "")
        while not store.check(keys):
            if self._lost is not None:
                raise self._lost
            if refused := self._refused_rank():
                raise refused
            sleep(pause)
            pause = min(1.0, 1.5 * pause)
            minutes = (monotonic() - start) / 60
            if monotonic() - reported > REPORT_S and self.rank == 1:
                reported = monotonic()
                log.info("Rank 0 has worked alone for %.0f minutes; the others wait.", minutes)
            if 60 * minutes > self.timeout.total_seconds():
                missing = [rank for rank in range(1, self.world_size) if not store.check([keys[rank]])]
                if missing:
                    raise self._make_error(
                        missing[0], f"has not arrived for trainer.timeout_min={self._minutes} minutes"
                    )

    def _watch_children(self) -> None:
        while not self._stopped.wait(BEAT_S):
            for rank, child in enumerate(self._children, 1):
                if child.poll():
                    self._handle_lost(rank, _describe_exit(child.returncode) + self._error_message(rank))
                    return

    def _watch_beats(self, store: TCPStore) -> None:
        beats = self._beats
        while not self._stopped.wait(BEAT_S):
            try:
                store.add(f"beat {self.rank}", 1)
                counts = {rank: store.add(f"beat {rank}", 0) for rank in range(self.world_size)}
                departed = store.add("left", 0)
            except RuntimeError:
                self._handle_lost(0, "has ended or hangs")
                return
            now = self._last_contact = monotonic()
            for rank, count in counts.items():
                if rank not in beats or beats[rank][0] != count:
                    beats[rank] = count, now
                elif now - beats[rank][1] > self.timeout.total_seconds() and not departed:
                    self._handle_lost(rank, f"has sent no heartbeat for trainer.timeout_min={self._minutes} minutes")
                    return

    def _watch_store(self) -> None:
        """Watch for a hang of rank zero, while the heartbeat thread would wait for its store forever."""
        while not self._stopped.wait(BEAT_S):
            if monotonic() - self._last_contact > self.timeout.total_seconds():
                self._handle_lost(0, f"has sent no heartbeat for trainer.timeout_min={self._minutes} minutes")
                return

    def _refused_rank(self) -> RankLostError | None:
        """Return the error of another rank that has ended with a UserError, None if there is none."""
        store = self._connected_store
        rank = int(store.get(REFUSED)) if store.check([REFUSED]) else self.rank
        if rank == self.rank:
            return None
        return self._make_error(rank, f"ended with status 2{self._error_message(rank)}")

    def _error_message(self, rank: int) -> str:
        """Return the message of a rank's UserError, or "" if there is none."""
        try:
            has_message = self._connected_store.check([f"error {rank}"])
            return f": {self._connected_store.get(f'error {rank}').decode()}" if has_message else ""
        except RuntimeError:
            return ""

    @property
    def _minutes(self) -> str:
        return f"{self.timeout.total_seconds() / 60:g}"

    def _make_error(self, rank: int, description: str) -> RankLostError:
        return RankLostError(
            rank,
            f"Rank {rank} of {self.world_size} {description}, so the run ends. {CONTINUE_HINT}",
            raised_by=self.rank,
        )

    def _handle_lost(self, rank: int, description: str) -> None:
        """Record a lost rank. End this process if it does not end by itself, as in a collective that waits forever."""
        lost = self._lost = self._make_error(rank, description)
        if self._stopped.wait(GRACE_S):
            return
        if lost.is_reported:
            print(f"\n{lost}", file=sys.stderr, flush=True)
        self.end_children()
        os._exit(2)


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    signal = Signals(-status).name
    return f"was ended by {signal}" + (" (often: out of memory)" if signal == "SIGKILL" else "")
