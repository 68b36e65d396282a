"""SBR: its anchors are the prompts of the first defender rows, tied to their states at the start."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers import training
from helpers.recording import Recording
from helpers.training import DEFENDER, Train, largest_difference
from lisa_lightning.data.source import Row
from lisa_lightning.method.sbr import SBR
from lisa_lightning.method.sft import SFT
from lisa_lightning.model.lora import load_tokenizer
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule


def test_the_penalty_is_the_movement_of_the_last_states_of_prompts(train: Train, tiny: Path) -> None:
    """The reference and the penalty are those of the model's own passes over each prompt alone."""
    seen = Recording()
    module = train(SBR(20.0, 3, False), folder="run", steps=3, batch_size=2, accumulate=2, loggers=[seen])
    penalty = _penalty(module)
    with module.backprop.swapped_weights(module.state["anchor"]):
        start = _last_states(module, tiny)
    (reference,) = module.state["reference"]
    assert reference.dtype == torch.float32
    torch.testing.assert_close(reference, start, atol=1e-5, rtol=1e-5)
    assert seen.values("sbr/penalty")[0] == 0
    assert min(seen.values("sbr/penalty")[1:]) > 0
    assert penalty == pytest.approx(20 * (_last_states(module, tiny) - start).square().mean().item(), rel=1e-3)


def test_nothing_counts_of_the_defender_rows_but_the_first_prompts(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = train(SBR(50.0, 3, False), folder="one", steps=3)
    answers = [Row(row.instruction, "", f"{i} another answer") for i, row in enumerate(DEFENDER)]
    monkeypatch.setattr(training, "DEFENDER", [*answers[:3], Row("another prompt", "", "!")])
    assert largest_difference(one, train(SBR(50.0, 3, False), folder="two", steps=3)) < 2e-5
    assert largest_difference(one, train(SBR(50.0, 4, False), folder="four", steps=3)) > 1e-4
    monkeypatch.setattr(training, "DEFENDER", answers[:3])  # fewer rows than anchors
    assert largest_difference(one, train(SBR(50.0, 8, False), folder="eight", steps=3)) < 2e-5


def test_the_official_term_counts_once_for_each_micro_batch(train: Train) -> None:
    split = {"batch_size": 2, "accumulate": 2, "steps": 2}
    official = train(SBR(100.0, 2, True), folder="official", **split)
    assert largest_difference(official, train(SBR(200.0, 2, False), folder="twice", **split)) < 1e-6
    assert largest_difference(official, train(SBR(100.0, 2, False), folder="once", **split)) > 1e-5


def test_anchors_have_no_dropout_and_users_rows_have_it(train: Train) -> None:
    """The reference equals that without dropout, and the first step that of SFT with dropout."""
    seen = Recording()
    first = train(SBR(50.0, 3, False), 0.5, folder="first", steps=1, loggers=[seen])
    assert seen.values("sbr/penalty") == [0]
    without = train(SBR(50.0, 3, False), 0.0, folder="without", steps=1)
    assert torch.equal(first.state["reference"][0], without.state["reference"][0])
    assert largest_difference(first, train(SFT(), 0.5, folder="sft", steps=1)) == 0
    assert largest_difference(first, without) > 1e-5
    trained = train(SBR(50.0, 3, False), 0.5, folder="later", steps=3)
    assert _penalty(trained) == _penalty(trained, seed=7) > 0
    assert trained.net.training


@pytest.mark.parametrize("rows", [[], [Row("a prompt that leaves no room for its answer " * 2, "", "no")]])
def test_without_an_anchor_it_is_refused(train: Train, monkeypatch: pytest.MonkeyPatch, rows: list[Row]) -> None:
    monkeypatch.setattr(training, "DEFENDER", rows)
    with pytest.raises(UserError, match=r"method=sbr: needs defender rows"):
        train(SBR(50.0, 3, False), steps=1)


def _penalty(module: LisaModule, seed: int = 0) -> float:
    """Return the penalty of another step at the weights of a module, with other dropout masks."""
    module.backprop.seed = seed
    output = module.method.gradient(module.backprop, module.trainer.datamodule.steps[0], module.state)  # type: ignore[attr-defined]
    return output.metrics["sbr/penalty"]


def _last_states(module: LisaModule, tiny: Path) -> Tensor:
    """Return the last hidden states of the first three defender prompts, by the model's usual pass over each."""
    tokenizer, states = load_tokenizer(tiny), []
    for row in DEFENDER[:3]:
        ids = torch.tensor([tokenizer(row.instruction, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            output = module.backprop.model(input_ids=ids, output_hidden_states=True)
        states.append(output.hidden_states[-1][0, -1])
    return torch.stack(states)
