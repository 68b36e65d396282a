"""Full-parameter fine-tuning of the tiny model: it equals a plain loop of PyTorch, and resumes exactly."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers.methods import FULL, METHODS, each
from helpers.training import USER, Train, largest_difference, weights
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import AdapterTraining, FineTuning, Lora
from lisa_lightning.method.lisa import Lisa
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.full import load_trainable, save_full
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.trainer.module import LisaModule

EPS = 1e-4
"""AdamW's epsilon, at which rounding of a tiny gradient does not become a step."""
LR = 5e-3


def plain_model(tiny: Path) -> tuple[Any, torch.optim.Optimizer]:
    """Return the tiny model and an optimizer of all its weights, without this package."""
    model = AutoModelForCausalLM.from_pretrained(tiny).train()
    return model, torch.optim.AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.01)


def descend(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def assert_equal_weights(module: LisaModule, model: Any) -> None:
    expected = {name: weight.detach() for name, weight in model.named_parameters()}
    torch.testing.assert_close(weights(module), expected, atol=1e-6, rtol=0)


def test_sft_on_all_weights_is_the_plain_loop(train: Train, tiny: Path) -> None:
    module = train(SFT(), full=True, steps=3, batch_size=len(USER), eps=EPS)
    datamodule: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    examples = [datamodule.steps.streams["user"][i] for i in range(len(USER))]
    ids = pad_sequence([torch.tensor(e.ids) for e in examples], batch_first=True)
    labels = pad_sequence([torch.tensor(e.labels) for e in examples], batch_first=True, padding_value=-100)
    mask = pad_sequence([torch.ones(len(e.ids), dtype=torch.long) for e in examples], batch_first=True)
    model, optimizer = plain_model(tiny)
    for _ in range(3):
        descend(model, optimizer, model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    assert_equal_weights(module, model)


def test_lisa_on_all_weights_is_the_plain_loop_with_its_penalty(train: Train, tiny: Path) -> None:
    rho = 2.0
    module = train(Lisa(1, 2, rho, 0.0), full=True, steps=6, eps=EPS)
    datamodule: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    model, optimizer = plain_model(tiny)
    anchor: list[Tensor] = []
    for t in range(6):
        batch = datamodule.steps[t].main
        assert (batch.stream == "alignment") == (t % 3 == 0)
        if t % 3 in (0, 1):
            anchor = [weight.detach().clone() for weight in model.parameters()]
        loss = sum(completion_loss(model, packs) for packs in batch.micro_batches) / batch.tokens
        drift = sum((w - a).square().sum() for w, a in zip(model.parameters(), anchor, strict=True))
        descend(model, optimizer, loss + rho / 2 * drift)
    assert_equal_weights(module, model)
    without = train(Lisa(1, 2, 0.0, 0.0), full=True, folder="without", steps=6, eps=EPS)
    assert largest_difference(module, without) > 1e-4


def test_every_weight_is_trained_in_float32(train: Train, tiny: Path) -> None:
    module, fresh = train(SFT(), full=True), load_trainable(tiny, "sdpa")
    assert all(m.training for m in fresh.modules())
    assert {w.dtype for w in trainable(fresh).values()} == {torch.float32}
    assert weights(module).keys() == dict(AutoModelForCausalLM.from_pretrained(tiny).named_parameters()).keys()
    for name, old in fresh.named_parameters():
        assert not torch.equal(old, weights(module)[name]), name


def test_tied_embeddings_train_and_are_saved_as_one(tiny: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "tied")
    net: Any = load_trainable(tmp_path / "tied", "sdpa")
    backprop = Backprop(net, lambda *_: iter(()))
    assert "lm_head.weight" not in backprop.names
    backprop.set_weights([w.detach() + 1 for w in backprop.weights])
    save_full(net, "float32", tmp_path / "tied", tmp_path / "saved")
    saved: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert torch.equal(saved.lm_head.weight, backprop.weights[0])


@pytest.mark.parametrize("name", each(FULL, ("lisa", "sft")))
def test_resume_equals_the_straight_run_bit_for_bit_on_all_weights(train: Train, name: str) -> None:
    straight = train(METHODS[name](), folder="straight", steps=7, full=True)
    with pytest.raises(InterruptedError):
        train(METHODS[name](), folder="broken", steps=7, stop_after=5, full=True)
    assert largest_difference(straight, train(METHODS[name](), folder="broken", steps=7, full=True)) == 0


@pytest.mark.parametrize("name", each(FULL, ("lisa",)))
def test_batch_four_is_two_micro_batches_of_two_on_all_weights(train: Train, name: str) -> None:
    whole = train(METHODS[name](), folder="a", steps=6, full=True, eps=EPS)
    halves = train(METHODS[name](), folder="b", steps=6, full=True, batch_size=2, accumulate=2, eps=EPS)
    assert largest_difference(whole, halves) < 5e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_model_has_the_data_type_that_is_served(train: Train, tiny: Path, tmp_path: Path, dtype: str) -> None:
    module = train(SFT(), full=True, steps=3)
    expected = {name: w.to(getattr(torch, dtype)) for name, w in weights(module).items()}
    save_full(module.finish(), dtype, tiny, tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert dict(saved.named_parameters()).keys() == expected.keys()
    for name, weight in saved.named_parameters():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name


def test_the_key_of_an_adapter_is_that_before_and_null_is_another() -> None:
    optim, lora = Optim(lr=1e-3, steps=5), Lora()
    adapter = asdict(FineTuning(1, lora, optim))
    assert adapter == asdict(AdapterTraining(1, lora, optim))
    assert asdict(FineTuning(1, None, optim)) == adapter | {"lora": None}
