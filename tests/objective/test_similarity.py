"""Similarity by gradient: equal to that of autograd on the whole batch, and 1 for a row that is a reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.training import ALIGNMENT, USER
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.packing import Example, pad
from lisa_lightning.model.full import load_trainable
from lisa_lightning.model.lora import attach, load, load_tokenizer
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss_scale import LossScale
from lisa_lightning.objective.similarity import gradient_cosines

UNLABELLED = Example((5, 6, 7), (-100, -100, -100))
MAKERS: dict[str, Callable[[Path], Any]] = {
    "adapter": lambda tiny: attach(load(tiny, "float32"), Lora(r=4, alpha=8, dropout=0.5), 0),
    "all weights": lambda tiny: load_trainable(tiny, "sdpa"),
}


@pytest.fixture(params=MAKERS)
def backprop(request: pytest.FixtureRequest, tiny: Path) -> Backprop:
    return Backprop(MAKERS[request.param](tiny).train(), lambda *_: iter(()))


@pytest.fixture
def encoder(tiny: Path) -> Encoder:
    return Encoder(load_tokenizer(tiny), "alpaca", 400)


def flat_gradient(backprop: Backprop, row: Example) -> Tensor:
    """Return the gradient of the loss of transformers on one row."""
    (packed,) = pad([row])
    loss = backprop.model(input_ids=packed.ids, labels=torch.tensor([row.labels])).loss
    gradients = torch.autograd.grad(loss, backprop.weights, allow_unused=True)
    return torch.cat([g.double().flatten() for g in gradients if g is not None])


def test_a_planted_reference_is_the_most_similar_row(backprop: Backprop, encoder: Encoder) -> None:
    candidates = [UNLABELLED, *map(encoder, USER)]
    planted = encoder(ALIGNMENT[0])
    cosines = gradient_cosines(backprop, [*candidates, planted], [planted])
    assert cosines.argmax() == len(candidates)
    assert cosines[-1] == pytest.approx(1, abs=1e-5)
    assert cosines[0] == -1
    assert backprop.net.training


def test_cosines_are_those_to_the_mean_gradient_without_dropout(backprop: Backprop, encoder: Encoder) -> None:
    candidates, references = ([encoder(row) for row in rows] for rows in (USER, ALIGNMENT))
    cosines = gradient_cosines(backprop, candidates, [*references, UNLABELLED])
    backprop.net.eval()
    mean = torch.stack([flat_gradient(backprop, row) for row in references]).mean(0)
    expected = [torch.cosine_similarity(flat_gradient(backprop, row), mean, dim=0) for row in candidates]
    torch.testing.assert_close(cosines, torch.stack(expected), atol=1e-5, rtol=0)
    # An overflow is repeated at a smaller scale, which changes nothing.
    backprop.loss_scale = LossScale(2.0**127)
    torch.testing.assert_close(gradient_cosines(backprop, candidates, references), cosines, atol=1e-5, rtol=0)
