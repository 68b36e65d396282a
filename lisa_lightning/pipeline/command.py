"""The command, `python run.py experiment=sst2_lisa`: start at `start`, then `main`.

Heavy imports wait until the config is accepted.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from time import time
from typing import Any

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us as exceptions, and we say them in a sentence
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # no stack of torch's where a rank is lost, which a sentence names

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lisa_lightning.config.arguments import prepared
from lisa_lightning.config.explain import explain
from lisa_lightning.config.help import usage
from lisa_lightning.config.paths import CONF
from lisa_lightning.config.validate import check
from lisa_lightning.pipeline import sweep
from lisa_lightning.runtime.files import drop_unused
from lisa_lightning.runtime.logs import prepare_logs
from lisa_lightning.runtime.ranks import RankLostError

OmegaConf.register_new_resolver("usage", usage, replace=True)  # conf/config.yaml gives it to --help
CONTINUE = "repeat the command to continue; for a single run add its hydra.run.dir and resume=true"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep, whose value is what a sweeper sees."""
    prepare_logs()
    if sweep.multirun():
        return sweep.job(cfg)
    try:
        check(cfg)
        from lisa_lightning.pipeline.run import run

        run(cfg)
    except Exception as error:
        status = refused(error)
        drop_unused(Path(HydraConfig.get().runtime.output_dir))
        sys.exit(status)  # which Hydra passes on; before an exception it would print all overrides
    return None


def start() -> int:
    """Run the command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        # An ASCII locale can't show every character of an answer or of a table's frame.
        getattr(stream, "reconfigure", dict)(errors="replace")
    before = signal.signal(signal.SIGTERM, _end)
    try:
        return _command()
    except SystemExit as stop:
        if stop.code is not None:
            raise
        _say(f"Stopped by SIGTERM; {CONTINUE}")
        return _without_threads(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        _say(f"Stopped by Ctrl-C; {CONTINUE}")
        return _without_threads(128 + signal.SIGINT)
    except BrokenPipeError:
        if not sweep.SHOWING & set(sys.argv):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        return 128 + signal.SIGPIPE
    except Exception as error:
        return refused(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _command() -> int:
    sys.argv[1:] = prepared(sys.argv[1:])
    sys.argv[1:], folder = sweep.placed(sys.argv[1:])
    if folder is None:
        main()
        return 0
    sweep.drop_run_variables()
    since = time() - 1  # a file system's clock is coarser
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)  # a sweeper may keep its study there
    try:
        main()
    except Exception as error:
        # Optuna raises ValueError after a study in which no job has a value.
        if not (isinstance(error, ValueError) and sweep.failed(folder, since)):
            if is_new:
                drop_unused(folder)
            raise
    return sweep.finish(folder, since)


def _end(*_: Any) -> None:
    """End the run where it is, as Ctrl-C does; what is on disk is enough to go on from."""
    raise SystemExit


def _without_threads(status: int) -> int:
    """Return the exit status; end at once where a request under way would hold the process until it times out."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(status)
    return status


def _say(sentence: str) -> None:
    """Print a sentence once for all ranks, on a line of its own."""
    if _is_first():
        print(sentence, file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Return whether this is the first rank, which prints what concerns all."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def refused(error: Exception) -> int:
    """Print the sentence about a person's mistake and return the exit status; pass other errors on."""
    sentence = explain(error)
    if sentence is None:
        raise error
    if error.is_reported if isinstance(error, RankLostError) else _is_first():
        print(sentence, file=sys.stderr, flush=True)
    return 2
