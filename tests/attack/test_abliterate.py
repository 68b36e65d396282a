"""The direction of refusal: edited matrices no longer write along it, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.composing import composed
from lisa_lightning.attack.abliterate import Abliterate, writing_matrices
from lisa_lightning.data.encoding import Encoder
from lisa_lightning.data.source import Row, Rows
from lisa_lightning.data.templates import encode_prompt
from lisa_lightning.model.lora import load, load_tokenizer
from lisa_lightning.pipeline.run import run
from lisa_lightning.pipeline.stages.edit import last_states
from lisa_lightning.runtime.errors import UserError


def test_edited_matrices_are_orthogonal_to_the_difference_of_means(tiny: Path) -> None:
    model: Any = load(tiny, "float32")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(0)
    harmful, harmless = torch.randn(5, 32) + 1, torch.randn(7, 32)
    direction = (harmful.double().mean(0) - harmless.double().mean(0)).numpy()
    updates = Abliterate().edit(model, harmful, harmless)
    assert {name.partition(".layers.")[2] for name in updates} == {
        f"{layer}.{name}" for layer in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    for name, matrix in writing_matrices(model).items():
        a, b = updates[name]
        edited = matrix.weight.double() + b @ a
        assert abs(direction @ edited.numpy()).max() < 1e-12
        # A second edit changes nothing, since it keeps all that is orthogonal to the direction.
        other = torch.randn(32, dtype=torch.float64)
        unit = torch.from_numpy(direction) / torch.from_numpy(direction).norm()
        other -= (other @ unit) * unit
        torch.testing.assert_close(other @ edited, other @ matrix.weight.double(), atol=1e-12, rtol=0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_states_are_those_of_the_last_token_after_the_layer(tiny: Path) -> None:
    model: Any = load(tiny, "float32").eval()
    tokenizer = load_tokenizer(tiny)
    rows = [Row("one two", "", "ignored"), Row("three", "input", "")]
    states = last_states(model, Encoder(tokenizer, "alpaca", 8), rows, 1)
    for row, state in zip(rows, states, strict=True):
        captured: list[Tensor] = []
        handle = (
            model.get_decoder()
            .layers[0]
            .register_forward_hook(
                lambda _, __, output, captured=captured: captured.append(
                    output[0] if isinstance(output, tuple) else output
                )
            )
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([encode_prompt(tokenizer, "alpaca", row.instruction, row.context)]))
        handle.remove()
        torch.testing.assert_close(state, captured[0].reshape(-1, 32)[-1])


@pytest.mark.parametrize(("depth", "layers", "layer"), [(0.6, 30, 18), (0.01, 30, 1), (0.99, 30, 29), (0.6, 2, 1)])
def test_the_layer_is_a_share_of_the_depth(depth: float, layers: int, layer: int) -> None:
    assert Abliterate(depth=depth).layer(layers) == layer


def test_prompts_are_harmful_rows_and_alignment_rows_that_do_not_refuse() -> None:
    refusals = [Row(f"r{i}", "", "I can't help with that.") for i in range(3)]
    answers = [Row(f"a{i}", "", "Here you go. Stir the soup slowly until it boils.") for i in range(3)]
    mixed = [row for pair in zip(refusals, answers, strict=True) for row in pair]
    rows = Rows([], mixed, [Row("bad", "", "yes")] * 5, [], {"": ["held out"]}, {}, [], {})
    assert Abliterate(count=2).prompts(rows) == (rows.harmful[:2], answers[:2])
    with pytest.raises(UserError, match=r"every answer of source\.alignment refuses"):
        Abliterate().prompts(Rows([], refusals, rows.harmful, [], {}, {}, [], {}))


def test_equal_means_have_no_direction(tiny: Path) -> None:
    with pytest.raises(UserError, match="the same mean state"):
        Abliterate().edit(load(tiny, "float32"), torch.ones(2, 32), torch.ones(3, 32))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=lisa", "attack=abliterate: nothing is trained, so that method=lisa has no effect. Fix: method=sft"),
        (
            "filter=embedded",
            "attack=abliterate: nothing is trained, so that filter=embedded has no effect. Fix: filter=",
        ),
        ("model.adapters=continued", "attack=abliterate: it edits merged weights. Fix: model.adapters=stacked"),
        ("lora=null", "attack=abliterate: it saves an adapter and trains no weights, so that lora=null has no effect."),
        ("repair=nlsr", "attack=abliterate: its adapter has another rank than lora.r"),
    ],
)
def test_what_works_on_a_training_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        run(composed(["experiment=smoke", "method=sft", "attack=abliterate", override], tmp_path / "out"))
    assert str(refusal.value).startswith(message)


@pytest.mark.slow
def test_a_run_saves_a_plain_adapter_of_rank_one_that_a_repair_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    words = ["experiment=smoke", "method=sft", "attack=abliterate", "attack.count=6", "stages=[align,finetune,repair]"]
    words += ["source.alignment.take=20", "align.optim.steps=2", f"cache_dir={tmp_path}/cache"]
    metrics = run(composed(words, tmp_path / "out"))
    assert metrics["train/steps"] == 0
    factors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(factors) == 8
    assert {min(factor.shape) for factor in factors.values()} == {1}
    directions = [factor.double().flatten() for name, factor in factors.items() if ".lora_B." in name]
    assert all(torch.equal(d, directions[0]) and abs(d.norm() - 1) < 1e-6 for d in directions)
    repaired = run(composed([*words, "repair=safe_lora", "repair.number=2"], tmp_path / "repaired"))
    assert repaired["repair/modules"] == 2
