"""Cost of each defense relative to plain training on the same rows: of a step, or of a whole repair.

Start at `measure`.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.setting import LORA, RHO, Result, Rows, spread
from benchmarks.training import batch, randomize
from lisa_lightning.align.booster import Booster
from lisa_lightning.align.lox import LoX
from lisa_lightning.align.repnoise import RepNoise
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.align.tar import TAR
from lisa_lightning.align.vaccine import Vaccine
from lisa_lightning.curate._row_losses import RowBackprop
from lisa_lightning.curate.pharmacist import Pharmacist
from lisa_lightning.curate.seal import SEAL
from lisa_lightning.data.interleave import Batch, Examples, Step
from lisa_lightning.data.packing import Example, pack, pad
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.method.asft import AsFT
from lisa_lightning.method.backdoor_align import BackdoorAlign
from lisa_lightning.method.base import Method, move_anchor
from lisa_lightning.method.bso import BSO
from lisa_lightning.method.constrained_sft import ConstrainedSFT
from lisa_lightning.method.ewc import EWC
from lisa_lightning.method.kl import KL
from lisa_lightning.method.ldifs import LDIFS
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.proximal import Proximal
from lisa_lightning.method.safegrad import SafeGrad
from lisa_lightning.method.salora import SaLoRA
from lisa_lightning.method.sbr import SBR
from lisa_lightning.method.sft import SFT
from lisa_lightning.method.spag import SPAG
from lisa_lightning.method.sppft import SPPFT
from lisa_lightning.method.vlguard import VLGuard
from lisa_lightning.method.vlguard_loss import VLGuardLoss
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.lora import attach, load
from lisa_lightning.objective.backprop import Backprop, State
from lisa_lightning.objective.proximal import squared_distance
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.base import Repair, RepairInputs
from lisa_lightning.repair.nlsr import NLSR
from lisa_lightning.repair.safe_lora import SafeLoRA
from lisa_lightning.repair.safe_merge import SafeMerge
from lisa_lightning.repair.task_arithmetic import TaskArithmetic

SIZE = 5
LARGEST = 8
"""Rows of the largest batch of a step, the held-out rows of TAR."""
REPEATED = 5
METHODS: dict[str, tuple[str, Callable[[], Method]]] = {
    "vaccine": ("2F 2B", lambda: Vaccine(2.0)),
    "t_vaccine": ("2F 2B, B down to the lowest of 8 active layers", lambda: TVaccine(3.0, 8, 20, 200, 0)),
    "repnoise": ("3F 3B and every layer's unembedding", lambda: RepNoise(1.0, 0.001, False, 0)),
    "booster": ("3F 3B", lambda: Booster(5.0, 0.1, 0.0, False)),
    "booster with vaccine": ("4F 4B", lambda: Booster(5.0, 0.1, 2.0, False)),
    "tar": ("8F 7B over 5 and 4 rows, 8 for 2F 2B", lambda: TAR(inner_steps=4, subsample=2)),
    "lox": ("1F 1B", lambda: LoX(6, 1.25)),
    "bso": ("1F 1B", lambda: BSO(0, 1)),
    "lisa": ("1F 1B", lambda: Lisa(0, 1, RHO, 0.0)),
    "proximal": ("1F 1B", lambda: Proximal(RHO, 0.0)),
    "ewc": ("1F 1B; its first step is not counted", lambda: EWC(1e9, 10, False)),
    "vlguard": ("1F 1B", lambda: VLGuard(0.2)),
    "vlguard_loss": ("1F 1B over 5 and 4 rows", lambda: VLGuardLoss(1.0, 4)),
    "ldifs": ("2F 1B", lambda: LDIFS(1e-4, None, None, False)),
    "constrained_sft": ("2F 1B", lambda: ConstrainedSFT(0.1, 5, 20, 5)),
    "asft": ("1F 1B", lambda: AsFT(1.0, False)),
    "backdoor_align": ("1F 1B; rows without the trigger's tokens", BackdoorAlign),
    "kl": ("2F 1B", lambda: KL(1.0)),
    "sbr": ("1F 1B over 5 and 8 rows", lambda: SBR(50.0, 8)),
    "safegrad": ("1F 1B over 5 rows, 2F 1B over 4", lambda: SafeGrad(1.0, 4)),
    "sppft": ("1F 1B, without gradients of frozen adapters", SPPFT),
    "salora": ("1F 1B with factors of twice the rank", SaLoRA),
    "spag": ("1F 1B, a user step or a safe step", lambda: SPAG(tau=0.0, delta=0.0, safe_rows=SIZE)),
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
CURATES: dict[str, tuple[str, Callable[[RowBackprop, Examples], Tensor]]] = {
    "seal": ("2F 2B", lambda passes, rows: SEAL(**SELECTOR).fit_weights(passes, rows, rows)),
    "pharmacist": (
        "5F 3B",
        lambda passes, rows: PHARMACIST.fit_logits(passes, rows, rows, rows, torch.zeros(len(rows))),
    ),
}
REPAIRS: dict[str, tuple[str, Callable[[], Repair]]] = {
    "safe_lora": ("no pass", lambda: SafeLoRA("number", 10, 0.5)),
    "antidote": ("1F", lambda: Antidote(0.1)),
    "safe_merge": ("no pass, the training of its safe adapter apart,", lambda: SafeMerge(threshold=1.0)),
    "task_arithmetic": ("no pass", TaskArithmetic),
    "nlsr": ("2F, the trainings of its reference apart,", lambda: NLSR(0.8, 0.5, 0.2, 0)),
}


def measure(folder: Path, rows: Rows) -> list[Result]:
    """Return the lines of all defenses: the time of a step, relative to that of SFT on the same user rows.

    SFT computes shared prefixes once. All streams hold rows of SST-2, so that a pass costs the same on each. There are
    as many alignment rows as user rows, unless the method plans otherwise.
    """
    backprop = _backprop(folder, rows)
    plain = SFT()
    results = [line for name in METHODS for line in _method(name, _backprop(folder, rows), backprop, plain, rows)]
    return [*results, *_selectors(backprop, plain, rows), *_repairs(backprop, plain, rows)]


def _backprop(folder: Path, rows: Rows) -> Backprop:
    """Return the passes of a new model with a random adapter. Every stream has rows of SST-2."""
    net = attach(load(folder, "float32"), LORA, seed=0)
    randomize(list(trainable(net).values()))

    def single_batch(stream: Stream, size: int, padded: bool, _: int | None) -> Iterator[Batch]:
        return iter([_batch(stream, rows.sst2[:size], padded)])

    return Backprop(net, single_batch, lambda: _deltas(net))


def _method(name: str, own: Backprop, backprop: Backprop, plain: SFT, rows: Rows) -> Iterator[Result]:
    """Yield the time of a method's step, and of what it does once before the first or after the last one.

    Args:
        name: key in METHODS.
        own: passes of the method. It may change the model.
        backprop: passes of SFT.
        plain: SFT.
        rows: rows of the steps.
    """
    cost, make = METHODS[name]
    method, plain_state = make(), plain.init(backprop)
    started = perf_counter()
    state = method.start(own, method.init(own))
    start_seconds = perf_counter() - started
    ratios, padded_ratios, sft_seconds = [], [], []
    for i in range(REPEATED + 1):
        examples = batch(rows.sst2, LARGEST, i)
        # Step 0 includes work that is done once: EWC's Fisher sum, T-Vaccine's harmful row.
        sft = _seconds(backprop, plain, plain_state, examples, i, set())
        seconds = _seconds(own, method, state, examples, i, method.unpacked_streams)
        padded_sft = _seconds(backprop, plain, plain_state, examples, i, {"user"})
        if i:
            ratios.append(seconds / sft)
            padded_ratios.append(seconds / padded_sft)
            sft_seconds.append(sft)
    padded_note = (
        f", {median(padded_ratios):.2f} times SFT's on rows padded as it needs them"
        if "alignment" in method.unpacked_streams
        else ""
    )
    note = f"{cost}; {spread(ratios)}{padded_note}"
    yield Result(f"{name}: a step, of SFT's", median(ratios), None, "lower", "times", note)
    if type(method).start is not Method.start:
        steps = start_seconds / median(sft_seconds)
        yield Result(f"{name}: once before the first step", steps, None, "lower", "steps of SFT", "one repetition")
    if type(method).finish is not Method.finish:
        started = perf_counter()
        method.finish(_factors(own), state)
        steps = (perf_counter() - started) / median(sft_seconds)
        yield Result(f"{name}: once after the last step", steps, None, "lower", "steps of SFT", "one repetition")


def _selectors(backprop: Backprop, plain: SFT, rows: Rows) -> Iterator[Result]:
    """Yield the time of a selector's training, relative to as many steps of SFT on the same candidates."""
    candidates = Examples(rows.sst2[: SIZE * REPEATED], lambda row: row)
    for name, (cost, select) in CURATES.items():
        ratios = []
        for _ in range(REPEATED):
            started = perf_counter()
            select(RowBackprop(backprop, pack, SIZE), candidates)
            seconds = perf_counter() - started
            sft = [
                _seconds(backprop, plain, plain.init(backprop), batch(rows.sst2, SIZE, i), i, set())
                for i in range(REPEATED)
            ]
            ratios.append(seconds / sum(sft))
        yield Result(f"{name}: a step, of SFT's", median(ratios), None, "lower", "times", f"{cost}; {spread(ratios)}")


def _repairs(backprop: Backprop, plain: SFT, rows: Rows) -> Iterator[Result]:
    """Yield the time of a repair, on as many padded rows as a step of SFT has."""
    net, factors = backprop.net, _factors(backprop)
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
        stream: _batches(stream, draw, rows, stream in padded) for stream, draw in method.plan(step).items()
    }
    moved, _ = move_anchor(method, step, backprop.weights, state)
    output = method.gradient(backprop, Step(step, 100, batches), moved)
    squared_distance(backprop.weights, moved["anchor"])
    seconds = perf_counter() - started
    state |= moved | output.state
    return seconds


def _batches(stream: Stream, draw: StreamBatch, rows: Sequence[Example], padded: bool) -> Batch:
    """Return the batch of a stream, with its further ones."""
    first = _batch(stream, rows[: draw.size or SIZE], padded)
    return replace(first, further=[_batch(stream, rows[:size], padded) for size in draw.further])


def _batch(stream: Stream, rows: Sequence[Example], padded: bool) -> Batch:
    return Batch(stream, [pad(rows) if padded else pack(rows)], sum(r.supervised for r in rows))


def _factors(backprop: Backprop) -> Factors:
    return {name: weight.detach().clone() for name, weight in zip(backprop.names, backprop.weights, strict=True)}


def _deltas(net: torch.nn.Module) -> dict[str, Delta]:
    """Return a random alignment update of rank 16 for every adapted layer."""
    weights = trainable(net)

    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02

    return {
        name: Delta.low_rank(factor(len(weights[b]), 16), factor(16, weights[a].shape[1]))
        for name, (a, b) in modules(weights).items()
    }
