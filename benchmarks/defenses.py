"""What each defense costs against plain training on the same rows: a step, or the whole of a repair."""

from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.setting import LORA, RHO, Result, Rows, spread
from benchmarks.training import batch, stir
from lisa_lightning.align.booster import Booster
from lisa_lightning.align.repnoise import RepNoise
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.align.vaccine import Vaccine
from lisa_lightning.curate._selector import UpperLoss
from lisa_lightning.curate.pharmacist import Pharmacist, unlikelihood
from lisa_lightning.curate.seal import SEAL
from lisa_lightning.data.interleave import Batch, Examples, Step
from lisa_lightning.data.packing import Example, pack, pad
from lisa_lightning.data.schedule import Stream
from lisa_lightning.method.asft import AsFT
from lisa_lightning.method.base import Method
from lisa_lightning.method.bso import BSO
from lisa_lightning.method.constrained_sft import ConstrainedSFT
from lisa_lightning.method.ewc import EWC
from lisa_lightning.method.ldifs import LDIFS
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.proximal import Proximal
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.vlguard import VLGuard
from lisa_lightning.method.vlguard_loss import VLGuardLoss
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.lora import attach, load, modules, trainable
from lisa_lightning.objective.backprop import Passes
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.base import Given, Repair
from lisa_lightning.repair.nlsr import NLSR
from lisa_lightning.repair.safe_lora import SafeLoRA

SIZE = 5
REPEATED = 5
METHODS: dict[str, tuple[str, Callable[[], Method]]] = {
    "vaccine": ("2F 2B", lambda: Vaccine(2.0)),
    "t_vaccine": ("2F 2B, B down to the lowest of 8 active layers", lambda: TVaccine(3.0, 8, 20, 200, 0)),
    "repnoise": ("3F 3B and every layer's unembedding", lambda: RepNoise(1.0, 0.001, False, 0)),
    "booster": ("3F 3B", lambda: Booster(5.0, 0.1, 0.0, False)),
    "booster with vaccine": ("4F 4B", lambda: Booster(5.0, 0.1, 2.0, False)),
    "bso": ("1F 1B", lambda: BSO(0, 1)),
    "lisa": ("1F 1B", lambda: Lisa(0, 1, RHO, 0.0)),
    "proximal": ("1F 1B", lambda: Proximal(RHO, 0.0)),
    "ewc": ("1F 1B; its first step is not counted", lambda: EWC(1e9, 10, False)),
    "vlguard": ("1F 1B", lambda: VLGuard(0.2)),
    "vlguard_loss": ("1F 1B over 5 and 4 rows", lambda: VLGuardLoss(1.0, 4)),
    "ldifs": ("2F 1B", lambda: LDIFS(1e-4, None, None, False)),
    "constrained_sft": ("2F 1B", lambda: ConstrainedSFT(0.1, 5, 20, 5)),
    "asft": ("1F 1B", lambda: AsFT(1.0, False)),
}
"""The passes that a step makes, F forward and B backward, as docs/methods.md has them; at the papers' settings."""
SELECTOR: dict[str, Any] = {
    "keep": 0.8,
    "epochs": 1,
    "batch_size": SIZE,
    "micro_batch": SIZE,
    "lr": 1e-5,
    "selector_lr": 5e-3,
    "adam": True,
    "activation": "softmax",
    "upper_weight": 0.9,
    "upper_decay": 0.1,
    "seed": 0,
}
CURATES: dict[str, tuple[SEAL | Pharmacist, UpperLoss]] = {
    "seal": (SEAL(**SELECTOR), lambda losses: losses),
    "pharmacist": (Pharmacist(**SELECTOR), unlikelihood),
}
REPAIRS: dict[str, tuple[str, Callable[[], Repair]]] = {
    "safe_lora": ("no pass", lambda: SafeLoRA("number", 10, 0.5)),
    "antidote": ("1F", lambda: Antidote(0.1)),
    "nlsr": ("2F, the trainings of its reference apart,", lambda: NLSR(0.8, 0.5, 0.2, 0)),
}


def measure(folder: Path, rows: Rows) -> list[Result]:
    """One line a defense: its step over that of SFT, prefixes shared, on the same rows of the main stream.

    All streams hold rows of SST-2, so that a pass costs the same on each; alignment rows are as many as user rows but
    where the method says otherwise.
    """
    net = attach(load(folder, "float32"), LORA, seed=0)
    stir(list(trainable(net).values()))

    def whole(stream: Stream, size: int) -> list[Batch]:
        return [_batch(stream, rows.sst2[:size], apart=False)]

    passes = Passes(net, lambda stream, size: iter(whole(stream, size)), lambda: _deltas(net))
    plain = SFT()
    plain.begin(passes, total_steps=100)
    results = []
    for name, (cost, made) in METHODS.items():
        method = made()
        method.begin(passes, total_steps=100)
        found, like = [], []
        for i in range(REPEATED + 1):
            own = batch(rows.sst2, SIZE, i)
            # Step 0 has what comes once: EWC's Fisher sum, T-Vaccine's harmful row.
            taken = {
                "sft": _seconds(passes, plain, own, i, set()),
                "own": _seconds(passes, method, own, i, method.rows_apart),
                "apart": _seconds(passes, plain, own, i, {"user"}),
            }
            if i:
                found.append(taken["own"] / taken["sft"])
                like.append(taken["own"] / taken["apart"])
        beside = (
            f", {median(like):.2f} times SFT's on rows padded as it needs them"
            if "alignment" in method.rows_apart
            else ""
        )
        note = f"{cost}; {spread(found)}{beside}"
        results.append(Result(f"{name}: a step, of SFT's", median(found), None, "lower", "times", note))
    return [*results, *_selectors(passes, plain, rows), *_repairs(net, passes, plain, rows)]


def _selectors(passes: Passes, plain: SFT, rows: Rows) -> Iterator[Result]:
    """A step of a selector's training, as often as a step of SFT on the candidates of each."""
    whole = Examples(rows.sst2[: SIZE * REPEATED], lambda row: row)
    for name, (own, upper_loss) in CURATES.items():
        found = []
        for _ in range(REPEATED):
            started = perf_counter()
            own.trained(passes, pack, whole, whole, upper_loss)
            taken = perf_counter() - started
            sft = [_seconds(passes, plain, batch(rows.sst2, SIZE, i), i, set()) for i in range(REPEATED)]
            found.append(taken / sum(sft))
        yield Result(f"{name}: a step, of SFT's", median(found), None, "lower", "times", f"2F 2B; {spread(found)}")


def _repairs(net: PeftModel, passes: Passes, plain: SFT, rows: Rows) -> Iterator[Result]:
    """A whole repair, on as many rows padded as a step of SFT has."""
    factors = {name: w.detach().clone() for name, w in trainable(net).items()}
    for name, (cost, made) in REPAIRS.items():
        found = []
        for i in range(REPEATED):
            own = batch(rows.sst2, SIZE, i)
            given = Given(factors, lambda: net, lambda _, own=own: pad(own), lambda: _deltas(net), lambda: factors)
            started = perf_counter()
            made().repair(given)
            taken = perf_counter() - started
            found.append(taken / _seconds(passes, plain, own, i, set()))
        note = f"{cost} over {SIZE} rows; {spread(found)}"
        yield Result(f"{name}: the repair, of SFT's step", median(found), None, "lower", "times", note)


def _seconds(passes: Passes, method: Method, rows: Sequence[Example], step: int, apart: Set[Stream]) -> float:
    """The method's gradient, the packing of its rows included."""
    started = perf_counter()
    batches: dict[Stream, Batch] = {
        stream: _batch(stream, rows[: draw.rows], stream in apart) for stream, draw in method.draws(step).items()
    }
    method.before_step(step, passes.weights)
    method.gradient(passes, Step(step, batches))
    method.after_step(passes.weights)
    return perf_counter() - started


def _batch(stream: Stream, rows: Sequence[Example], apart: bool) -> Batch:
    return Batch(stream, [pad(rows) if apart else pack(rows)], sum(r.supervised for r in rows))


def _deltas(net: torch.nn.Module) -> dict[str, Delta]:
    """What aligning changed in every adapted layer: random, of rank 16."""
    weights = trainable(net)

    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02

    return {
        name: Delta.low_rank(factor(len(weights[b]), 16), factor(16, weights[a].shape[1]))
        for name, (a, b) in modules(weights).items()
    }
