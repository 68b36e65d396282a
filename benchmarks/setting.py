"""Setting of all benchmarks: the embedded model, rows (`Rows`), the adapter, and a line of the table (`Result`)."""

import os
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from lisa_lightning.config.settings import Lora
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.files import read_records
from lisa_lightning.data.packing import Example
from lisa_lightning.data.reading import Reading
from lisa_lightning.data.source import Row
from lisa_lightning.model.base_model import base_model
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.cache import cache_folder
from lisa_lightning.runtime.ranks import OneRank
from lisa_lightning.task.sst2 import SST2

ROOT = Path(__file__).parents[1]
PUBLIC_ROWS = Path(os.environ.get("PUBLIC_ROWS", ROOT.parent / "shared" / "data")).absolute()
"""Folder of the published data sets, one subfolder each; it may be absent. Tests read them too."""
LORA = Lora(r=8, alpha=16, dropout=0.0, targets=["q_proj", "v_proj"])
RHO = 0.1
REPETITIONS = 7


@dataclass(frozen=True, slots=True)
class Result:
    """A line of the table."""

    what: str
    measured: float
    target: float | None
    """Target value, None for no target."""
    better: str
    """`higher` or `lower`."""
    unit: str
    note: str

    @property
    def met(self) -> bool:
        """Whether the target is reached; true without a target."""
        if self.target is None:
            return True
        return self.measured >= self.target if self.better == "higher" else self.measured <= self.target


def embedded_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct in the cache."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["model=smollm2_135m"]).model
    return base_model(OneRank(), cfg, cache_folder(os.environ.get("LISA_CACHE", "~/.cache/lisa_lightning")))[0]


class Rows:
    """Encoded rows of SST-2 and alignment rows with long answers, from public sets if present, else embedded."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = load_tokenizer(folder)
        task = SST2()
        labelled = Reading({"sentence": "sentence", "label": "label"})
        public = (PUBLIC_ROWS / "sst2" / "train.tsv").exists()
        paths = (
            [str(PUBLIC_ROWS / "sst2" / f) for f in ("train.tsv", "dev.tsv")]
            if public
            else ["embedded:sst2_mini_train.jsonl", "embedded:sst2_mini_test.jsonl"]
        )
        self.source = "SST-2" if public else "embedded rows"
        train, self.test = (read_records(path, labelled, task.row) for path in paths)
        self.sst2 = [self._encode(row) for row in random.Random(0).sample(train, 1000)]
        safe = PUBLIC_ROWS / "safety_tuned_llamas" / "safety_only_data_Instructions.json"
        path, answer = (str(safe), "output") if safe.exists() else ("embedded:alignment.jsonl", "response")
        prompt = "instruction" if safe.exists() else "prompt"
        alignment = read_records(path, Reading({"p": prompt, "r": answer}), lambda r: Row(r["p"], "", r["r"]))
        encoded = [self._encode(row) for row in random.Random(0).sample(alignment, 1000)]
        min_length = sorted(row.length for row in encoded)[-len(encoded) // 5]
        self.alignment = [row for row in encoded if row.length >= min_length]
        """The longest fifth of the alignment rows."""
        self.harmful = read_records(
            "embedded:harmful_prompts.jsonl", Reading({"prompt": "prompt"}), lambda r: r["prompt"]
        )

    def _encode(self, row: Row) -> Example:
        return encode(self.tokenizer, "alpaca", row, max_length=256)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the range of repeated measurements as text."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f} in {len(values)} repetitions"


def ratio(what: str, values: Sequence[float], target: float, note: str = "") -> Result:
    """Return a result for a speed relative to the reference.

    Args:
        what: text of the line.
        values: ratio of each repetition. The result has their median.
        target: smallest ratio that meets the target.
        note: further text.
    """
    return Result(what, median(values), target, "higher", "times", "; ".join(filter(None, [spread(values), note])))


def machine() -> dict[str, Any]:
    """Return hardware and versions that the measurements depend on."""
    cpu = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
