"""Every method's steps on one of several gloo ranks, without Lightning: a check of passes over ranks."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from helpers.methods import ALIKE, FULL, METHODS
from helpers.training import ALIGNMENT, DEFENDER, USER, deltas
from lisa_lightning.config.settings import Lora
from lisa_lightning.curate.base import Candidates
from lisa_lightning.curate.pharmacist import Pharmacist
from lisa_lightning.curate.seal import SEAL
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.interleave import Batch, Examples, StepBatches
from lisa_lightning.data.packing import Packing, pack, pad
from lisa_lightning.data.schedule import Stream
from lisa_lightning.data.source import Row
from lisa_lightning.method.base import Method, move_anchor
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.model.factors import causal_model
from lisa_lightning.model.full import load_trainable
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.model.sharding import shard
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss_scale import LossScale

STEPS = 4
WAYS = {
    "sharded": {"sharded": True},
    "checkpointed": {"checkpointed": True},
    "sharded and checkpointed": {"sharded": True, "checkpointed": True},
}
"""Ways to save memory, which change no result, and their options of `steps`."""


def steps(
    method: Method,
    tiny: Path,
    rank: int,
    world: int,
    dropout: float = 0.0,
    apart: bool = False,
    count: int = STEPS,
    full: bool = False,
    sharded: bool = False,
    checkpointed: bool = False,
) -> list[Tensor]:
    """Return the trained weights after a few steps on four rows each, which the ranks share.

    Args:
        apart: keep rows without shared prefixes, whatever the method says.
        full: train all weights instead of an adapter.
        sharded: shard the frozen weights.
        checkpointed: compute the layers again in the backward pass.
    """
    base = load_trainable(tiny, "sdpa") if full else load(tiny, "float32")
    if sharded:
        shard(base, init_device_mesh("cpu", (world,)))
    lora = Lora(r=4, alpha=8, dropout=dropout, targets="all-linear")
    net: Any = base if full else attach(base, lora, 0)
    if checkpointed:
        checkpoint_activations(causal_model(net))
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    encoded = partial(encode, tokenizer, "chat", max_length=64)
    rows: dict[Stream, list[Row]] = {"user": USER, "alignment": ALIGNMENT, "defender": DEFENDER}
    streams: dict[Stream, Examples] = {name: Examples(own, encoded) for name, own in rows.items()}
    data = StepBatches(
        streams, pad if apart else pack, method, STEPS, 4 // world, 1, seed=1, rank=rank, world=world, even=sharded
    )
    backprop = Backprop(net, data.iter_stream, lambda: deltas(net))
    state = method.start(backprop, method.init(backprop))
    optimizer = torch.optim.SGD(backprop.weights, lr=0.1)  # AdamW would blow up what differs by rounding alone
    for t in range(count):
        backprop.seed = STEPS * rank + t
        state, _ = move_anchor(method, t, backprop.weights, state)
        output = method.gradient(backprop, data[t], state)
        state |= output.state
        for weight, gradient in zip(backprop.weights, output.gradients, strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(backprop.weights, 1.0)
        optimizer.step()
    return [w.detach() for w in backprop.weights]


def selections(tiny: Path, world: int, sharded: bool = False) -> list[Tensor]:
    """Return the scores of Pharmacist and SEAL for the alignment rows, whose batches the ranks share."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    encoded = partial(encode, tokenizer, "chat", max_length=64)

    def make_model() -> tuple[Backprop, Packing]:
        base = load(tiny, "float32")
        if sharded:
            shard(base, init_device_mesh("cpu", (world,)))
        net = attach(base, Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
        return Backprop(net, lambda *_: iter(())), pack

    settings: dict[str, Any] = {"validation_rows": 2, "warmup_steps": 3, "batch_size": 2, "attack_batch": 2}
    pharmacist = Pharmacist(**settings, epochs=2, selector_lr=100.0)
    seal = SEAL(epochs=2, batch_size=3, micro_batch=2, selector_lr=100.0)
    candidates = Candidates(Examples(ALIGNMENT, encoded), Examples(DEFENDER, encoded), make_model)
    return [selector.scores(candidates) for selector in (pharmacist, seal)]


def scale_after_overflow(tiny: Path, rank: int) -> float:
    """Return the loss scale after a step whose gradients overflow on the second rank only."""
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    backprop = Backprop(net, lambda *_: iter(()), loss_scale=LossScale(2.0))
    factor = float("inf") if rank == 1 else 1.0
    batch = Batch("user", [[torch.zeros(())]], tokens=1)  # type: ignore[list-item]
    output = backprop.skip_on_overflow(
        lambda: backprop.gradient(batch, lambda *_: factor * sum(w.sum() for w in backprop.weights))  # type: ignore[arg-type, return-value]
    )
    assert output is None
    return backprop.loss_scale.value  # type: ignore[union-attr]


def main(tiny: Path, out: Path, rank: int, world: int) -> None:
    """Run all methods, and all pairs that must agree, on this rank. The first rank writes the results."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=world)
    found = {name: steps(make(), tiny, rank, world) for name, make in METHODS.items()}
    found |= {f"{name}, dropping": steps(make(), tiny, rank, world, 0.2) for name, make in METHODS.items()}
    for way, options in WAYS.items():
        found |= {f"{name}, {way}": steps(make(), tiny, rank, world, 0.2, **options) for name, make in METHODS.items()}
    found |= {f"{name} on all weights": steps(METHODS[name](), tiny, rank, world, full=True) for name in FULL}
    for name, (method, builds_on) in ALIKE.items():
        apart = "alignment" in method.unpacked_streams
        found[f"{name} without its term"] = steps(method, tiny, rank, world, 0.2)
        found[f"what {name} builds on"] = steps(builds_on, tiny, rank, world, 0.2, apart)
    found["selections"] = selections(tiny, world)
    found["selections, sharded"] = selections(tiny, world, sharded=True)
    found["loss scale after an overflow on the other rank"] = [torch.tensor(scale_after_overflow(tiny, rank))]
    at_reference = {"constrained_sft at its reference": METHODS["constrained_sft"], "what it is then": METHODS["sft"]}
    for name, make in at_reference.items():
        found[name] = steps(make(), tiny, rank, world, 0.2, count=1)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
