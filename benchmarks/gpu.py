"""Random models of true shapes on a GPU: memory of a step against the formula, speed against the reference.

`make gpu` runs tests/test_gpu.py, which asserts what must hold and writes the lines into benchmarks/results/DEVICE.md.
Start at `build_net` and `our_step`.
"""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.footprint import Lora, Shape, Step
from benchmarks.random_model import model_of
from benchmarks.setting import RHO, Result, machine, ratio, spread
from benchmarks.training import Ours, lisa
from lisa_lightning.config.settings import Lora as LoraSettings
from lisa_lightning.data.packing import IGNORED, Example, pack
from lisa_lightning.evaluation.generate import generate
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.model.factors import causal_model
from lisa_lightning.model.hooks import decoder_layers
from lisa_lightning.model.lora import attach
from lisa_lightning.runtime.files import write_text

RESULTS: Final = Path(__file__).parent / "results"
PREFIX: Final = 64
"""Tokens that all rows share, as an instruction."""
OWN: Final = 64
"""Tokens of a row alone, the second half of which is learnt."""
ROWS: Final = 8
"""Rows of a step."""
REPETITIONS: Final = 5
GIB: Final = 2**30


def build_net(shape: Shape, storage: str, lora: Lora, device: torch.device, checkpointed: bool = False) -> Any:
    """Return a random model of a shape on a device, with an adapter.

    Args:
        shape: shape of the model.
        storage: type of its frozen weights, `bfloat16` or `nf4`.
        lora: its adapter.
        device: the device, on which the weights are drawn.
        checkpointed: whether layers are computed again in the backward pass.
    """
    with device:
        model = model_of(shape)
    if storage == "nf4":
        _quantize(model)
    settings = LoraSettings(r=lora.r, alpha=16, dropout=0.0, targets=list(lora.targets))
    net = attach(model, settings, seed=0).to(device)
    if checkpointed:
        checkpoint_activations(causal_model(net))
    return net


def _quantize(model: Any) -> None:
    """Replace the linear modules of the layers by those of bitsandbytes in nf4, one after another."""
    bnb = import_module("bitsandbytes")

    for layer in decoder_layers(model):
        for name, module in [*layer.named_modules()]:
            if isinstance(module, nn.Linear):
                quantized = bnb.nn.Linear4bit(
                    module.in_features,
                    module.out_features,
                    bias=module.bias is not None,
                    compute_dtype=torch.bfloat16,
                    quant_type="nf4",
                )
                quantized.weight = bnb.nn.Params4bit(module.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                quantized.bias = module.bias
                layer.set_submodule(name, quantized.to(module.weight.device))


def random_rows(vocabulary: int) -> list[Example]:
    """Return rows that share a prefix, as those of a task."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, vocabulary, (count,), generator=generator).tolist())

    prefix, unlearnt = draw(PREFIX), (IGNORED,) * (PREFIX + OWN // 2)
    return [Example(prefix + ids, unlearnt + ids[OWN // 2 :]) for ids in (draw(OWN) for _ in range(ROWS))]


def step_size(rows: Sequence[Example]) -> Step:
    """Return the size of a step with these rows, for the formula."""
    packs = pack(rows)
    tokens, supervised = sum(p.ids.numel() for p in packs), sum(len(p.targets) for p in packs)
    return Step(tokens, max(p.ids.shape[1] for p in packs), len(packs), supervised)


def our_step(net: Any, rows: Sequence[Example]) -> Callable[[], float]:
    """Return the step of `LisaModule` under Lisa, in bfloat16 autocast."""
    ours = Ours(net, lisa())

    def step() -> float:
        with torch.autocast(ours.backprop.device.type, torch.bfloat16):
            return ours.step(rows)

    return step


def reference_step(net: Any, rows: Sequence[Example]) -> Callable[[], float]:
    """Return the step of the reference, in bfloat16 autocast."""
    weights: list[Tensor] = [w for w in net.parameters() if w.requires_grad]
    anchor = [w.detach().clone() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, foreach=True)

    def step() -> float:
        with torch.autocast(weights[0].device.type, torch.bfloat16):
            return reference.step(net, optimizer, weights, anchor, RHO, rows)

    return step


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, with all its work on the device."""
    _synchronize(device)
    started = perf_counter()
    call()
    _synchronize(device)
    return perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare_steps(net: Any, rows: Sequence[Example], name: str) -> tuple[Result, Result]:
    """Return the speed of our step against the reference, run in turn, and our tokens per second."""
    ours, theirs = our_step(net, rows), reference_step(net, rows)
    device = next(net.parameters()).device
    for call in (ours, theirs):
        seconds(call, device)  # the first call loads kernels
    times = [(seconds(ours, device), seconds(theirs, device)) for _ in range(REPETITIONS)]
    tokens = sum(len(row.ids) for row in rows)
    rates = [tokens / ours_s for ours_s, _ in times]
    return (
        ratio(
            f"{name}: a step of Lisa, faster than the reference", [theirs_s / ours_s for ours_s, theirs_s in times], 1.0
        ),
        Result(f"{name}: rows trained", median(rates), None, "higher", "tokens/s", spread(rates, 0)),
    )


def compare_answers(model: Any, prompts: Sequence[list[int]], tokens: int, name: str) -> tuple[Result, Result]:
    """Return the speed of batched answers against one prompt at a time, and our tokens per second.

    The reference answers one prompt in each repetition.

    Args:
        model: a model in evaluation mode.
        prompts: token ids.
        tokens: new tokens of an answer.
        name: name of the model.
    """
    device = model.get_input_embeddings().weight.device
    times = []
    for i in range(REPETITIONS + 1):
        ours_s = seconds(lambda: generate(model, prompts, tokens, lambda _: False), device) / len(prompts)
        prompt = prompts[i % len(prompts)]
        times.append((ours_s, seconds(lambda p=prompt: reference.answer(model, p, tokens, None), device)))
    rates = [tokens / ours_s for ours_s, _ in times[1:]]
    what = f"{name}: {len(prompts)} answers of {tokens} tokens"
    return (
        ratio(f"{what}, faster than one at a time", [theirs_s / ours_s for ours_s, theirs_s in times[1:]], 1.0),
        Result(what, median(rates), None, "higher", "tokens/s", spread(rates, 0)),
    )


def write_results(results: Sequence[Result], device_name: str, minutes: float) -> Path:
    """Write the lines into benchmarks/results/DEVICE.md, and return the file."""
    host = machine()
    lines = [f"| {r.what} | {r.measured:.3g} {r.unit} | {'yes' if r.met else '**no**'} | {r.note} |" for r in results]
    about = f"{device_name} with {host['cpu']}; Python {host['python']}, torch {host['torch']}"
    head = f"Measured by `make gpu` in {minutes:.1f} minutes on: {about}. Models have random weights of true shapes."
    path = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.md"
    write_text(path, "\n".join([head, "", "| what | measured | met | how |", "|---|---|---|---|", *lines, ""]))
    return path
