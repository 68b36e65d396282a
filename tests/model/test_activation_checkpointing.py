"""Activation checkpointing: the same training bit for bit, and less saved memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.footprint import Lora as FootprintLora
from benchmarks.footprint import Shape, Step
from benchmarks.random_model import model_of
from helpers.counting_memory import adapted, saved_bytes
from helpers.methods import FULL, METHODS, each
from helpers.training import Train, largest_difference
from lisa_lightning.config.same_run import is_bookkeeping
from lisa_lightning.model import hooks
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.model.hooks import add_to_outputs, attention_blocks, capture_outputs, mlp_blocks
from lisa_lightning.model.lora import load
from lisa_lightning.runtime.errors import UserError

QUICK = ("lisa", "vaccine")


@pytest.mark.parametrize("name", each(METHODS, QUICK))
def test_training_is_the_same_bit_for_bit(train: Train, name: str) -> None:
    """Training with checkpoints equals that without, with dropout, micro-batches and a resumption."""
    options: dict[str, Any] = {"dropout": 0.2, "steps": 5, "batch_size": 2, "accumulate": 2}
    plain = train(METHODS[name](), folder="plain", **options)
    with pytest.raises(InterruptedError):
        train(METHODS[name](), folder="run", checkpointed=True, stop_after=4, **options)
    assert largest_difference(plain, train(METHODS[name](), folder="run", checkpointed=True, **options)) == 0


@pytest.mark.parametrize("name", each(FULL, ()))
def test_training_of_all_weights_is_the_same_bit_for_bit(train: Train, name: str) -> None:
    plain, checkpointed = (
        train(METHODS[name](), folder=str(c), steps=3, full=True, checkpointed=c) for c in (False, True)
    )
    assert largest_difference(plain, checkpointed) == 0


@pytest.fixture
def model(tiny: Path) -> Any:
    """Return the tiny model in training mode, with checkpoints and trainable weights."""
    model: Any = load(tiny, "float32").requires_grad_(True).train()
    checkpoint_activations(model)
    return model


def test_a_backward_pass_repeats_changes_of_outputs_after_they_end(tiny: Path, model: Any) -> None:
    """Hooks act as in the forward pass, whether the backward pass runs inside them or after them."""
    plain: Any = load(tiny, "float32").requires_grad_(True).train()
    ids = torch.arange(3, 20)[None]
    gradients = []
    for net in (plain, model):
        blocks = [*attention_blocks(net), *mlp_blocks(net)]
        offsets = [torch.linspace(-1, 1, 32) * (i + 1) for i in range(len(blocks))]
        with add_to_outputs(blocks, offsets), capture_outputs(blocks) as outputs:
            loss = net(ids, use_cache=False).logits.square().mean() + outputs[0].square().mean()
            inside = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            assert len(outputs) == len(blocks)
        with add_to_outputs(blocks, [10 * offset for offset in offsets]), capture_outputs(blocks) as others:
            gradients += [inside, torch.autograd.grad(loss, list(net.parameters()))]
        assert not others
    assert not hooks._changes
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_a_model_without_support_is_rejected(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"trainer\.activation_checkpointing=true: LlamaForCausalLM does not support"):
        checkpoint_activations(model)


def test_results_are_the_same_run() -> None:
    assert is_bookkeeping("trainer.activation_checkpointing")


def test_layers_save_their_inputs_alone() -> None:
    shape, step = Shape(3, 64, 160, 4, 4, 16, 300), Step(tokens=200, width=100, passes=2, supervised=20)
    lora = FootprintLora(4, ("q_proj", "v_proj"))
    nets = [adapted(model_of(shape), lora) for _ in range(2)]
    checkpoint_activations(nets[1].get_base_model())
    plain, checkpointed = (saved_bytes(net, step) for net in nets)
    assert checkpointed < 0.3 * plain
