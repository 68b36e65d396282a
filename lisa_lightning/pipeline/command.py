"""The command, `lisa-lightning` or in a clone `python run.py`: start at `start`, then `main`.

Heavy imports wait until the config is accepted.
"""

import logging
import os
import signal
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path
from time import time
from typing import Any

# Hydra raises errors instead of printing them, so that `explain` can turn them into one sentence.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
# Matrix products on CUDA are deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A lost rank is reported in one sentence, without torch's stack.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from tqdm.contrib.logging import logging_redirect_tqdm

from lisa_lightning import __version__
from lisa_lightning.config.arguments import prepare_arguments
from lisa_lightning.config.explain import explain
from lisa_lightning.config.help import usage
from lisa_lightning.config.paths import COMMAND, CONF
from lisa_lightning.config.validate import check
from lisa_lightning.pipeline import sweep
from lisa_lightning.pipeline.request import Request
from lisa_lightning.runtime.files import drop_unused
from lisa_lightning.runtime.logs import prepare_logs, silence_libraries
from lisa_lightning.runtime.ranks import RankLostError, is_first_of_node, is_rank_zero
from lisa_lightning.runtime.stop import STOP_SIGNALS, Stopped

HELP_FLAGS = {"--help", "-h"}
CONTINUE = "repeat the command to continue; for a single run add its hydra.run.dir and resume=true"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run once, or run one job of a sweep and return its objective for the sweeper."""
    prepare_logs()
    if sweep.is_multirun():
        return sweep.run_job(cfg)
    out = Path(HydraConfig.get().runtime.output_dir)
    try:
        check(cfg)
        from lisa_lightning.pipeline.run import run

        silence_libraries()
        with logging_redirect_tqdm():
            run(Request.from_hydra(cfg, HydraConfig.get(), out))
    except Exception as error:
        status = refused(error)
        drop_unused(out)
        # Hydra passes on an exit. For an exception it would print all overrides first.
        sys.exit(status)
    return None


def start() -> int:
    """Run the command and return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        # An ASCII locale can't encode every character of an answer or of a table's frame.
        getattr(stream, "reconfigure", dict)(errors="replace")
    previous_handlers = {number: signal.signal(number, _end) for number in STOP_SIGNALS}
    try:
        return _command()
    except Stopped as stop:
        _print_once(f"Stopped by {stop.signal.name}; {_continuation()}")
        return _exit_status(128 + stop.signal)
    except KeyboardInterrupt:
        _print_once(f"Stopped by Ctrl-C; {_continuation()}")
        return _exit_status(128 + signal.SIGINT)
    except BrokenPipeError:
        if not sweep.INFO_FLAGS & set(sys.argv):
            raise
        # A reader such as `| head` has closed the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        return refused(error)
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def _command() -> int:
    if "--version" in sys.argv[1:]:
        # Hydra's flag would print the version of Hydra.
        print(f"lisa-lightning {__version__}")
        return 0
    if _is_export():
        _export(sys.argv[2:])
        return 0
    if HELP_FLAGS & {*sys.argv[1:]}:
        # Hydra would take seconds to list the config groups, whatever its template shows.
        for line in usage():
            print(line, flush=True)
        return 0
    sys.argv[1:] = prepare_arguments(sys.argv[1:])
    sys.argv[1:], folder = sweep.resolve_sweep_dir(sys.argv[1:])
    if folder is None:
        main()
        return 0
    sweep.drop_run_variables()
    # Times of files are coarser than the clock.
    since = time() - 1
    is_new = not folder.exists()
    # A sweeper may store its study in the folder.
    folder.mkdir(parents=True, exist_ok=True)
    try:
        main()
    except Exception as error:
        # Optuna raises ValueError after a study in which no job has an objective.
        if not (isinstance(error, ValueError) and sweep.has_failed(folder, since)):
            if is_new:
                drop_unused(folder)
            raise
    return sweep.finalize_sweep(folder, since)


def _is_export() -> bool:
    return sys.argv[1:2] == ["export"]


def _continuation() -> str:
    """Return the advice after an interruption. An export starts again."""
    return "repeat the command" if _is_export() else CONTINUE


def _export(arguments: list[str]) -> None:
    """Export a run: `export RUN OUT`."""
    parser = ArgumentParser(
        f"{COMMAND} export",
        description="Merge the adapter of a finished run, and write a model that plain transformers loads anywhere.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run, such as outputs/mine")
    parser.add_argument("out", metavar="OUT", help="folder to write, absent or empty")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload OUT to this private repository of the hub too")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    prepare_logs()
    from lisa_lightning.pipeline.export import export

    silence_libraries()
    export(options.run, options.out, options.push_to_hub)


def _end(number: int, _: Any) -> None:
    """End the run at once, as Ctrl-C does. The files on disk suffice to continue it."""
    raise Stopped(signal.Signals(number))


def _exit_status(status: int) -> int:
    """Return the exit status. End the process at once if a thread, such as a pending request, would delay its end."""
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        sys.stdout.flush()
        os._exit(status)
    return status


def _print_once(sentence: str) -> None:
    """Print a line on stderr, on rank zero only."""
    if is_rank_zero():
        print(sentence, file=sys.stderr, flush=True)


def refused(error: Exception) -> int:
    """Print the message of an error that the user can fix, and return the exit status. Raise other errors again."""
    sentence = explain(error)
    if sentence is None:
        raise error
    if error.is_reported if isinstance(error, RankLostError) else is_first_of_node():
        print(sentence, file=sys.stderr, flush=True)
    return 2
