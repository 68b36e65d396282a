"""Cost of each defense relative to plain training on the same rows: of a step, or of a whole repair.

Start at `measure`.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.setting import LORA, RHO, Result, Rows, spread
from benchmarks.training import batch, randomize
from lisa_lightning.align.booster import Booster
from lisa_lightning.align.repnoise import RepNoise
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.align.vaccine import Vaccine
from lisa_lightning.curate._row_losses import RowPasses
from lisa_lightning.curate.pharmacist import Pharmacist
from lisa_lightning.curate.seal import SEAL
from lisa_lightning.data.interleave import Batch, Examples, Step
from lisa_lightning.data.packing import Example, pack, pad
from lisa_lightning.data.schedule import Stream
from lisa_lightning.method.asft import AsFT
from lisa_lightning.method.base import Method, move_anchor
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
from lisa_lightning.model.factors import modules, trainable
from lisa_lightning.model.lora import attach, load
from lisa_lightning.objective.backprop import Backprop, State
from lisa_lightning.objective.proximal import squared_distance
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.base import Repair, RepairInputs
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
"""Name -> passes of a step, F forward and B backward, as in docs/methods.md; and a method at the paper's settings."""
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
PHARMACIST = Pharmacist(epochs=1, batch_size=SIZE, attack_batch=SIZE, micro_batch=SIZE)
CURATES: dict[str, tuple[str, Callable[[RowPasses, Examples], Tensor]]] = {
    "seal": ("2F 2B", lambda passes, rows: SEAL(**SELECTOR).fit_weights(passes, rows, rows)),
    "pharmacist": (
        "5F 3B",
        lambda passes, rows: PHARMACIST.fit_logits(passes, rows, rows, rows, torch.zeros(len(rows))),
    ),
}
REPAIRS: dict[str, tuple[str, Callable[[], Repair]]] = {
    "safe_lora": ("no pass", lambda: SafeLoRA("number", 10, 0.5)),
    "antidote": ("1F", lambda: Antidote(0.1)),
    "nlsr": ("2F, the trainings of its reference apart,", lambda: NLSR(0.8, 0.5, 0.2, 0)),
}


def measure(folder: Path, rows: Rows) -> list[Result]:
    """Return one line per defense: the time of its step, relative to that of SFT on the same user rows.

    SFT computes shared prefixes once. All streams hold rows of SST-2, so that a pass costs the same on each. There are
    as many alignment rows as user rows, unless the method plans otherwise.
    """
    net = attach(load(folder, "float32"), LORA, seed=0)
    randomize(list(trainable(net).values()))

    def single_batch(stream: Stream, size: int, padded: bool) -> Iterator[Batch]:
        return iter([_batch(stream, rows.sst2[:size], padded)])

    backprop = Backprop(net, single_batch, lambda: _deltas(net))
    plain = SFT()
    plain_state = plain.init(backprop)
    results = []
    for name, (cost, make) in METHODS.items():
        method = make()
        state = method.init(backprop)
        ratios, padded_ratios = [], []
        for i in range(REPEATED + 1):
            examples = batch(rows.sst2, SIZE, i)
            # Step 0 includes work that is done once: EWC's Fisher sum, T-Vaccine's harmful row.
            sft = _seconds(backprop, plain, plain_state, examples, i, set())
            seconds = _seconds(backprop, method, state, examples, i, method.unpacked_streams)
            padded_sft = _seconds(backprop, plain, plain_state, examples, i, {"user"})
            if i:
                ratios.append(seconds / sft)
                padded_ratios.append(seconds / padded_sft)
        padded_note = (
            f", {median(padded_ratios):.2f} times SFT's on rows padded as it needs them"
            if "alignment" in method.unpacked_streams
            else ""
        )
        note = f"{cost}; {spread(ratios)}{padded_note}"
        results.append(Result(f"{name}: a step, of SFT's", median(ratios), None, "lower", "times", note))
    return [*results, *_selectors(backprop, plain, rows), *_repairs(net, backprop, plain, rows)]


def _selectors(backprop: Backprop, plain: SFT, rows: Rows) -> Iterator[Result]:
    """Yield the time of a selector's training, relative to as many steps of SFT on the same candidates."""
    candidates = Examples(rows.sst2[: SIZE * REPEATED], lambda row: row)
    for name, (cost, select) in CURATES.items():
        ratios = []
        for _ in range(REPEATED):
            started = perf_counter()
            select(RowPasses(backprop, pack, SIZE), candidates)
            seconds = perf_counter() - started
            sft = [
                _seconds(backprop, plain, plain.init(backprop), batch(rows.sst2, SIZE, i), i, set())
                for i in range(REPEATED)
            ]
            ratios.append(seconds / sum(sft))
        yield Result(f"{name}: a step, of SFT's", median(ratios), None, "lower", "times", f"{cost}; {spread(ratios)}")


def _repairs(net: PeftModel, backprop: Backprop, plain: SFT, rows: Rows) -> Iterator[Result]:
    """Yield the time of a repair, on as many padded rows as a step of SFT has."""
    factors = {name: w.detach().clone() for name, w in trainable(net).items()}
    for name, (cost, make) in REPAIRS.items():
        ratios = []
        for i in range(REPEATED):
            examples = batch(rows.sst2, SIZE, i)
            inputs = RepairInputs(
                factors,
                lambda: net,
                lambda _, examples=examples: pad(examples),
                lambda: _deltas(net),
                lambda: factors,
                lambda: factors,
            )
            started = perf_counter()
            make().repair(inputs)
            seconds = perf_counter() - started
            ratios.append(seconds / _seconds(backprop, plain, plain.init(backprop), examples, i, set()))
        note = f"{cost} over {SIZE} rows; {spread(ratios)}"
        yield Result(f"{name}: the repair, of SFT's step", median(ratios), None, "lower", "times", note)


def _seconds(
    backprop: Backprop, method: Method, state: State, rows: Sequence[Example], step: int, padded: Set[Stream]
) -> float:
    """Return the seconds of a gradient, including the packing of its rows. `padded` streams are not packed."""
    started = perf_counter()
    batches: dict[Stream, Batch] = {
        stream: _batch(stream, rows[: draw.size], stream in padded) for stream, draw in method.plan(step).items()
    }
    moved, _ = move_anchor(method, step, backprop.weights, state)
    output = method.gradient(backprop, Step(step, 100, batches), moved)
    squared_distance(backprop.weights, moved["anchor"])
    seconds = perf_counter() - started
    state |= moved | output.state
    return seconds


def _batch(stream: Stream, rows: Sequence[Example], padded: bool) -> Batch:
    return Batch(stream, [pad(rows) if padded else pack(rows)], sum(r.supervised for r in rows))


def _deltas(net: torch.nn.Module) -> dict[str, Delta]:
    """Return a random alignment update of rank 16 for every adapted layer."""
    weights = trainable(net)

    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02

    return {
        name: Delta.low_rank(factor(len(weights[b]), 16), factor(16, weights[a].shape[1]))
        for name, (a, b) in modules(weights).items()
    }
