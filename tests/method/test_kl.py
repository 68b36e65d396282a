"""KL: its penalty is that of the models' own passes, and it is zero at the start."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.recording import Recording
from helpers.training import USER, Train, largest_difference
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.encoding import encode
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Example, pack, pad
from lisa_lightning.method.kl import KL
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.objective.backprop import Backprop


def test_the_penalty_is_the_mean_kl_at_label_tokens_of_single_rows(tiny: Path) -> None:
    """Value and gradient are those of passes over each row alone, for micro-batches of shared prefixes."""
    backprop, examples = _moved(tiny)
    method = KL(0.7, "labels")
    state = {"anchor": [torch.zeros_like(w) for w in backprop.weights]}
    tokens = sum(e.supervised for e in examples)
    batch = Batch("user", [pack(examples[:3]), pack(examples[3:])], tokens)
    output = method.gradient(backprop, Step(0, 1, {"user": batch}), state)

    loss, penalty = torch.zeros(()), torch.zeros(())
    with torch.no_grad(), backprop.swapped_weights(state["anchor"]):
        references = [_label_logits(backprop.net, example) for example in examples]
    for example, reference in zip(examples, references, strict=True):
        logits = _label_logits(backprop.net, example)
        labels = torch.tensor([label for label in example.labels if label >= 0])
        loss = loss + F.cross_entropy(logits, labels, reduction="sum") / tokens
        p = reference.softmax(-1)
        penalty = penalty + 0.7 * (p * (p.log() - logits.log_softmax(-1))).sum() / tokens
    assert output.loss == pytest.approx(loss.item(), rel=1e-5)
    assert output.metrics["kl/penalty"] == pytest.approx(penalty.item(), rel=1e-4)
    assert output.metrics["kl/penalty"] > 0.005
    for gradient, expected in zip(output.gradients, torch.autograd.grad(loss + penalty, backprop.weights), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("over", ["vocabulary", "positions"])
def test_official_forms_count_padding(tiny: Path, over: Any) -> None:
    backprop, examples = _moved(tiny)
    state = {"anchor": [torch.zeros_like(w) for w in backprop.weights]}

    def penalty(rows: list[Example]) -> float:
        batch = Batch("user", [pad(rows)], sum(e.supervised for e in rows))
        return KL(1.0, over).gradient(backprop, Step(0, 1, {"user": batch}), state).metrics["kl/penalty"]

    short, long = sorted(examples, key=lambda e: len(e.ids))[:: len(examples) - 1]
    alone = (penalty([short]) + penalty([long])) / 2
    assert len(short.ids) < len(long.ids)
    assert penalty([short, long]) != pytest.approx(alone, rel=1e-3)
    assert penalty([short, short]) == pytest.approx(penalty([short]), rel=1e-4)  # a mean over rows


def test_the_first_step_is_that_of_sft_with_dropout(train: Train) -> None:
    seen = Recording()
    split = {"batch_size": 2, "accumulate": 2}
    first = train(KL(5.0, "labels"), 0.3, folder="kl", steps=1, loggers=[seen], **split)
    assert seen.values("kl/penalty") == [0]
    assert largest_difference(first, train(SFT(), 0.3, folder="sft", steps=1, **split)) < 1e-6


def _moved(tiny: Path) -> tuple[Backprop, list[Example]]:
    """Return a model whose adapter is not that of the start, and rows of different lengths."""
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)
    backprop = Backprop(net, lambda *_: iter(()))
    generator = torch.Generator().manual_seed(0)
    backprop.set_weights([0.3 * torch.randn(w.shape, generator=generator) for w in backprop.weights])
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{{ messages[0].content }}"
    return backprop, [encode(tokenizer, "chat", row, 64) for row in USER[:5]]


def _label_logits(net: Any, example: Example) -> Tensor:
    """Return the logits that predict the labels of a row, by the model's usual pass over it."""
    logits = net(input_ids=torch.tensor([example.ids])).logits[0, :-1]
    return logits[torch.tensor(example.labels[1:]) >= 0]
