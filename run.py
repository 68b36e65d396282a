"""The entry point: `python run.py experiment=sst2_lisa`. Heavy imports wait until the config is accepted."""

import os
import signal
import sys
from pathlib import Path
from time import time

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us as exceptions, and we say them in a sentence
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lisa_lightning import sweep
from lisa_lightning.config import check, refuse_passwords
from lisa_lightning.disk import drop_unused
from lisa_lightning.explain import explain
from lisa_lightning.usage import usage

OmegaConf.register_new_resolver("usage", usage, replace=True)  # conf/config.yaml gives it to --help


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One run, or one job of a sweep, whose value is what a sweeper sees."""
    if sweep.multirun():
        return sweep.job(cfg)
    try:
        check(cfg)
        from lisa_lightning.pipeline import run

        run(cfg)
    except Exception as error:
        status = refused(error)
        drop_unused(Path(HydraConfig.get().runtime.output_dir))
        sys.exit(status)  # which Hydra passes on; before an exception it would print all overrides
    return None


def start() -> int:
    """The exit status of a command."""
    try:
        refuse_passwords(sys.argv[1:])
        sys.argv[1:], folder = sweep.placed(sys.argv[1:])
        if folder is None:
            main()
            return 0
        since = time() - 1  # a file system's clock is coarser
        folder.mkdir(parents=True, exist_ok=True)  # a sweeper may keep its study there
        try:
            main()
        except ValueError:  # Optuna's, of a study in which no job has a value
            if not sweep.failed(folder, since):
                raise
        return sweep.finish(folder, since)
    except SystemExit as stop:
        if stop.code is not None:
            raise
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # Lightning ends so, and would have it look like success
            way = "the same command goes on, that of a single run with its folder and resume=true"
            print(f"Stopped by SIGTERM; {way}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        if not sweep.SHOWING & set(sys.argv):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has read enough
        return 128 + signal.SIGPIPE
    except Exception as error:
        return refused(error)


def refused(error: Exception) -> int:
    """Say a person's mistake in a sentence, pass others on; the exit status."""
    sentence = explain(error)
    if sentence is None:
        raise error
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return 0  # the first rank says it; a failing child would take that one down in mid-sentence
    print(sentence, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(start())
