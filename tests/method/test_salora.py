"""SaLoRA: the start, the projection, and the plain adapter that computes what the trained model does."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from helpers import training
from helpers.methods import METHODS
from helpers.training import Train
from lisa_lightning.config.settings import Lora
from lisa_lightning.method.salora import SaLoRA, _Decomposed
from lisa_lightning.model.factors import Factors, modules, trainable
from lisa_lightning.model.lora import attach, load, save_adapter
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.runtime.errors import UserError
from lisa_lightning.trainer.module import LisaModule

IDS = torch.arange(3, 60)[None]
SCALING = 2.0  # of the adapter that `train` attaches


def logits(net: Any, training: bool = False) -> Tensor:
    with torch.no_grad():
        return net.train(training)(input_ids=IDS).logits


def updates(factors: Factors) -> dict[str, Tensor]:
    """Return s B A of each module."""
    return {module: SCALING * factors[b].detach() @ factors[a].detach() for module, (a, b) in modules(factors).items()}


def test_the_function_at_the_start_is_the_models_also_with_dropout(train: Train, tiny: Path) -> None:
    module = train(METHODS["salora"](), 0.5, steps=1, lr=1e-12, weight_decay=0.0)
    base = load(tiny, "float32")
    for training_mode in (False, True):
        torch.testing.assert_close(logits(module.net, training_mode), logits(base, training_mode), atol=1e-5, rtol=0)
    assert min(update.norm() for update in updates(dict(trainable(module.net))).values()) > 0.1


def test_the_saved_adapter_computes_what_the_trained_model_does(train: Train, tiny: Path, tmp_path: Path) -> None:
    module = train(METHODS["salora"](), steps=6, lr=2e-2)
    trained, start = logits(module.net), logits(load(tiny, "float32"))
    factors = {name: weight.detach().clone() for name, weight in trainable(module.net).items()}
    finished = module.finish()
    assert (trained - start).abs().max() > 0.1
    torch.testing.assert_close(logits(finished), trained, atol=1e-5, rtol=0)
    save_adapter(finished, str(tiny), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    loaded = PeftModel.from_pretrained(load(tiny, "float32"), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=0)
    moved = {name: a - factors[name] for name, a in zip(factors, module.state["anchor"], strict=True)}
    assert all(difference.norm() > 1e-3 for difference in moved.values())  # A and B train


def test_the_change_of_a_layer_is_orthogonal_to_the_projected_directions(train: Train) -> None:
    module = train(METHODS["salora"](), steps=6, lr=2e-2)
    bases = module.state["projection"]
    changes = updates(dict(trainable(module.finish()))).values()
    for v, change in zip(bases, changes, strict=True):
        torch.testing.assert_close(v.T @ v, torch.eye(v.shape[1]), atol=1e-5, rtol=0)
        assert (v.T @ change).norm() < 1e-5 < 1e-2 < change.norm()


def test_directions_that_no_output_has_are_left_out(train: Train) -> None:
    """The inputs of the first layer depend on their token alone, and the answers have four different ones."""
    module = train(METHODS["salora"](), steps=1)
    widths = {m: v.shape[1] for m, v in zip(modules(module.backprop.names), module.state["projection"], strict=True)}
    assert METHODS["salora"]().safety_rank == 6  # type: ignore[attr-defined]
    assert widths["model.layers.0.self_attn.q_proj"] == 4
    assert widths["model.layers.1.self_attn.q_proj"] == 6


def test_directions_come_from_the_outputs_on_the_answers(train: Train, tiny: Path) -> None:
    """V V^T equals that of the official definition, from the model's own passes over single rows."""
    module = train(METHODS["salora"](), steps=1)
    model: Any = load(tiny, "float32").eval()
    layer = model.model.layers[1].self_attn.v_proj
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    outputs: list[Tensor] = []
    for i in range(5):
        example = data.streams["alignment"][i]
        with torch.no_grad():
            handle = layer.register_forward_hook(lambda _, inputs, out: outputs.append(out[0]))
            model(input_ids=torch.tensor([example.ids]))
            handle.remove()
        outputs[-1] = outputs[-1][torch.tensor(example.labels) != -100]
    expected = torch.linalg.svd(torch.cat(outputs).double()).Vh[:6].T.float()
    index = list(modules(module.backprop.names)).index("model.layers.1.self_attn.v_proj")
    v = module.state["projection"][index]
    torch.testing.assert_close(v @ v.T, expected @ expected.T, atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", [4, 10])
def test_the_start_is_the_best_approximation_for_any_alpha(tiny: Path, alpha: float) -> None:
    net = attach(load(tiny, "float32"), Lora(r=4, alpha=alpha, dropout=0.0, targets=["down_proj"]), 0)
    adapted: Any = net.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    decomposed = _Decomposed(Backprop(net, lambda *_: iter(())), adapted, torch.float32)
    a, b = decomposed.factors(4, alpha / 4)
    w = adapted.base_layer.weight
    u, s, vh = torch.linalg.svd(w)
    torch.testing.assert_close(alpha / 4 * b @ a, u[:, :4] * s[:4] @ vh[:4], atol=1e-5, rtol=0)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("targets", "r", "safety_rank", "message"),
    [
        (["q_proj", "v_proj"], 4, 32, r"method\.safety_rank=32: model\.layers\.0\.self_attn\.q_proj has 32 outputs"),
        (["q_proj", "v_proj"], 40, 3, r"lora\.r=40: .*q_proj has only 32 singular vectors .* Fix: lora\.r=32 or less"),
        (["q_proj", "embed_tokens"], 4, 3, r"lora\.targets: .* linear layers\. Fix: remove embed_tokens"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tiny: Path, targets: list[str], r: int, safety_rank: int, message: str
) -> None:
    model: Any = load(tiny, "float32")
    with torch.device("meta"):
        net = attach(model.to("meta"), Lora(r=r, alpha=4, dropout=0.0, targets=targets), 0)
    with pytest.raises(UserError, match=message):
        SaLoRA(safety_rank).init(Backprop(net, lambda *_: iter(())))


@pytest.mark.parametrize("stream", ["ALIGNMENT", "USER"])
def test_rows_without_an_answer_are_refused(train: Train, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    rows = [training.Row("a prompt that leaves no room for its answer " * 2, "", "no")] * 5
    monkeypatch.setattr(training, stream, rows)
    with pytest.raises(UserError, match=rf"method=salora: needs {stream.lower()} rows with an answer"):
        train(METHODS["salora"](), steps=1)


def test_a_resumed_model_computes_as_the_straight_one(train: Train) -> None:
    trained = partial(train, METHODS["salora"](), steps=5)
    straight: LisaModule = trained(folder="straight")
    with pytest.raises(InterruptedError):
        trained(folder="broken", stop_after=4)
    resumed = trained(folder="broken")
    assert torch.equal(logits(resumed.net), logits(straight.net))
    assert torch.equal(logits(resumed.finish()), logits(straight.finish()))
