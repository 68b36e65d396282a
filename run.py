"""The entry point: `python run.py experiment=sst2_lisa`. Heavy imports wait until the config is accepted."""

import os
import sys

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors reach us as exceptions, and we say them in a sentence
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
from omegaconf import DictConfig

from lisa_lightning.config import check, explain


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """Run the stages; the harmful score is what a sweeper sees."""
    check(cfg)
    from lisa_lightning.pipeline import run

    return run(cfg).get("final/harmful_score")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        if int(os.environ.get("LOCAL_RANK", "0")) > 0:
            sys.exit(0)  # the first rank says it; a failing child would take that one down in mid-sentence
        print(sentence, file=sys.stderr)
        sys.exit(2)
