"""TAR against plain torch: the adversaries' steps, the outer gradient, its draws and its bound."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.recording import Recording
from helpers.training import ALIGNMENT, DEFENDER, Train, largest_difference
from lisa_lightning.align.sft import SFT
from lisa_lightning.align.tar import TAR
from lisa_lightning.config.instances import parse
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.interleave import Batch, Examples, Step, StepBatches
from lisa_lightning.data.packing import Packing, pack, pad
from lisa_lightning.data.schedule import Stream, StreamBatch
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss_scale import GradientOverflowError
from lisa_lightning.runtime.errors import UserError

METHOD = TAR(attacks=2, attack_lrs=(1e-3, 3e-3), attack_rows=3, held_out_rows=2, switch_share=1.0, schedule_lambda=0.5)


@pytest.fixture
def backprop(tiny: Path) -> Backprop:
    """Return the passes of the tiny model, whose adapter differs from the one at the start."""
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    generator = torch.Generator().manual_seed(0)
    for weight in trainable(net).values():
        weight.detach().add_(0.1 * torch.randn(weight.shape, generator=generator))
    return Backprop(net, lambda *_: iter(()))


@pytest.fixture
def step(tiny: Path) -> Any:
    """Return a function that returns the third step of a method."""
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    encoded = partial(encode, tokenizer, "chat", max_length=64)
    streams: dict[Stream, Examples] = {
        "alignment": Examples(ALIGNMENT, encoded),
        "defender": Examples(DEFENDER, encoded),
    }

    def third(method: TAR, packing: Packing) -> Step:
        return StepBatches(streams, packing, method, 9, 4, 1, seed=1)[2]

    return third


def anchor(backprop: Backprop) -> list[Tensor]:
    return [torch.zeros_like(weight) for weight in backprop.weights]


def batches(batch: Batch) -> Iterator[Batch]:
    return iter([batch, *batch.further])


def logits(net: Any, batch: Batch, every: bool) -> tuple[Tensor, Tensor]:
    """Return the logits of padded rows at their predictors, or at all positions, and the labels."""
    ((padded,),) = batch.micro_batches
    flat = net(input_ids=padded.ids, attention_mask=padded.mask.long()).logits.flatten(0, 1)
    return flat if every else flat[padded.logit_positions], padded.targets


def cross_entropy(net: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(*logits(net, batch, every=False))


def hidden_states(net: Any, batch: Batch) -> tuple[Tensor, ...]:
    ((padded,),) = batch.micro_batches
    return net(input_ids=padded.ids, attention_mask=padded.mask.long(), output_hidden_states=True).hidden_states


def distance(states: tuple[Tensor, ...], references: tuple[Tensor, ...], batch: Batch, every: bool) -> Tensor:
    """Return the mean distance of hidden states, over depths and positions."""
    ((padded,),) = batch.micro_batches
    counted = torch.ones_like(padded.mask) if every else padded.row_count > 0
    pairs = zip(states[1:], references[1:], strict=True)
    # The embedding's distance is zero, at which this norm has no derivative.
    return torch.stack([(a - b)[counted].norm(dim=-1).mean() for a, b in pairs]).sum() / len(states)


def plain_gradient(net: Any, method: TAR, step: Step) -> list[Tensor]:
    """Return the outer gradient of a step of padded rows by torch alone. The start is the model without its adapter."""
    weights = list(trainable(net).values())
    start = [weight.detach().clone() for weight in weights]
    harmful, benign = batches(step.batches["defender"]), iter(step.main.further)
    every, count, growth = method.all_positions, method.inner_steps, method.schedule_lambda
    with net.disable_adapter(), torch.no_grad():
        references = hidden_states(net, step.main)
    retain = cross_entropy(net, step.main) + distance(hidden_states(net, step.main), references, step.main, every)
    sums = [method.retain_scale * gradient for gradient in torch.autograd.grad(retain, weights)]
    for attack in method.draw(step.index):
        held_out = next(harmful)
        adversary = torch.optim.AdamW(weights, lr=attack.lr, weight_decay=0.01)
        for i in range(count):
            first, second = next(benign), next(harmful)
            adversary.zero_grad()
            cross_entropy(net, first if i < attack.benign_steps else second).backward()
            adversary.step()
            if (i + 1) % method.subsample == 0:
                probabilities = logits(net, held_out, every)[0].softmax(-1)
                entropy = -(probabilities * probabilities.log()).sum(-1).mean()
                share = 1 / count if growth is None else math.exp(growth * (i + 1 - count))
                for sum_, gradient in zip(sums, torch.autograd.grad(entropy, weights), strict=True):
                    sum_ -= method.grad_scale / method.attacks * share * gradient
        with torch.no_grad():
            for weight, value in zip(weights, start, strict=True):
                weight.copy_(value)
    return sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "packing"),
    [
        ({}, pack),
        ({"all_positions": True}, pad),
        ({"schedule_lambda": None, "retain_scale": 0.5, "subsample": 1}, pack),
    ],
)
def test_the_outer_gradient_is_plain_torchs(
    backprop: Backprop, step: Any, changes: dict[str, Any], packing: Packing
) -> None:
    method = replace(METHOD, **changes)
    assert [0 < attack.benign_steps < method.inner_steps for attack in method.draw(2)] == [True, True]
    before = [weight.detach().clone() for weight in backprop.weights]
    output = method.gradient(backprop, step(method, packing), {"anchor": anchor(backprop)})
    assert all(torch.equal(weight, start) for weight, start in zip(backprop.weights, before, strict=True))
    expected = plain_gradient(backprop.net, method, step(method, pad))
    for actual, gradient in zip(output.gradients, expected, strict=True):
        torch.testing.assert_close(actual, gradient, atol=2e-6, rtol=1e-4)
    assert output.loss == pytest.approx(cross_entropy(backprop.net, step(method, pad).main).item(), rel=1e-5)


def test_adversaries_leave_no_trace_where_a_gradient_overflows(
    backprop: Backprop, step: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [weight.detach().clone() for weight in backprop.weights]
    changed: list[bool] = []

    def overflow(_: list[Tensor]) -> None:
        changed.append(not torch.equal(backprop.weights[0], before[0]))
        if len(changed) == 4:
            raise GradientOverflowError

    monkeypatch.setattr(backprop, "raise_on_overflow", overflow)
    with pytest.raises(GradientOverflowError):
        METHOD.gradient(backprop, step(METHOD, pack), {"anchor": anchor(backprop)})
    assert changed == [False, True, True, True]
    assert all(torch.equal(weight, start) for weight, start in zip(backprop.weights, before, strict=True))


def test_entropy_counts_from_the_lower_bound_on(backprop: Backprop, step: Any) -> None:
    def gradients(**changes: Any) -> tuple[list[Any], float]:
        method = replace(METHOD, attacks=1, inner_steps=2, **changes)
        output = method.gradient(backprop, step(method, pack), {"anchor": anchor(backprop)})
        return list(output.gradients), output.metrics["tar/penalty"]

    free, penalty = gradients()
    retain, _ = gradients(grad_scale=0.0)
    assert penalty < 0
    for bound, expected in ((penalty, free), (math.nextafter(penalty, 0), retain)):
        assert all(torch.equal(a, b) for a, b in zip(gradients(lower_bound=bound)[0], expected, strict=True))
    assert not torch.equal(free[0], retain[0])


@pytest.mark.slow
def test_representations_change_nothing_at_the_weights_that_alignment_starts_from(train: Train) -> None:
    """The distance is zero in the first step, with dropout too, and so is its derivative."""
    seen = Recording()
    method = TAR(grad_scale=0.0, inner_steps=1, subsample=1, attack_rows=1, held_out_rows=1)
    trained = partial(train, dropout=0.3, batch_size=2, accumulate=2)
    moved = trained(method, folder="tar", steps=2, loggers=[seen])
    assert seen.values("tar/distance")[0] == 0 < seen.values("tar/distance")[1]
    assert largest_difference(moved, trained(SFT(), folder="sft", steps=2)) > 0
    first = trained(method, folder="first", steps=1)
    assert largest_difference(first, trained(SFT(), folder="first of sft", steps=1)) == 0


def test_draws_are_those_of_seed_and_step() -> None:
    method = TAR(attacks=3, inner_steps=60, attack_lrs=(1e-3, 2e-3, 4e-3), switch_share=0.5, seed=7)
    attacks = [attack for step in range(400) for attack in method.draw(step)]
    assert method.draw(5) == replace(method, grad_scale=0.0).draw(5) == attacks[15:18]
    assert replace(method, seed=8).draw(5) != method.draw(5) != method.draw(6)
    for lr in method.attack_lrs:
        assert sum(attack.lr == lr for attack in attacks) == pytest.approx(400, rel=0.1)
    benign = [attack.benign_steps for attack in attacks if attack.benign_steps]
    assert len(benign) == pytest.approx(600, rel=0.1)
    assert sum(benign) / len(benign) == pytest.approx(60 * 6 / 9, rel=0.05)
    assert not any(attack.benign_steps for step in range(99) for attack in replace(method, switch_share=0.0).draw(step))


def test_a_step_draws_the_rows_of_its_attacks() -> None:
    method = TAR(attacks=2, inner_steps=3, attack_rows=4, held_out_rows=8)
    harmful = StreamBatch(5, 8, (4, 4, 4, 8, 4, 4, 4))
    assert method.plan(5) == {"alignment": StreamBatch(5), "defender": harmful}
    switching = replace(method, switch_share=0.1)
    assert switching.plan(5) == {"alignment": StreamBatch(5, further=(4,) * 6), "defender": harmful}


def test_an_entropy_that_is_never_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"align\.method: .*subsample=5 and inner_steps=4: the entropy is never"):
        parse(TAR, {"subsample": 5}, "align.method")
