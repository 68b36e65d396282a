"""The formula of memory and time against models that are really built, and docs/models.md against the formula."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import footprint
from benchmarks.footprint import BATCH, SHAPES, Lora, Shape, Step, training_memory
from benchmarks.random_model import model_of
from helpers.counting_memory import Live, adapted, autocast_of_a_gpu, packs_of, saved_bytes
from helpers.paths import ROOT
from lisa_lightning.data.packing import IGNORED, Example, pack
from lisa_lightning.model.activation_checkpointing import checkpoint_activations
from lisa_lightning.objective.loss import completion_loss
from lisa_lightning.objective.proximal import snapshot

PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "qwen2_5_0_5b": 494_032_768,
    "opt_2_7b": 2_651_596_800,
    "llama2_7b": 6_738_415_616,
    "mistral_7b": 7_241_732_096,
    "llama3_8b": 8_030_261_248,
    "gemma2_9b": 9_241_705_984,
    "llama3_2_1b": 1_235_814_400,
    "smollm3_3b": 3_075_098_624,
    "qwen3_4b": 4_022_468_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "qwen2_5_7b_instruct": 7_615_616_512,
    "llama3_1_8b_instruct": 8_030_261_248,
    "qwen3_8b": 8_190_735_360,
    "llama3_3_70b_instruct": 70_553_706_496,
}
SMALL = {
    "llama": Shape(2, 64, 160, 4, 4, 16, 300),
    "mistral": Shape(2, 64, 160, 4, 2, 16, 300),
    "qwen2": Shape(2, 64, 160, 4, 2, 16, 300, family="qwen2", tied=True),
    "gemma2": Shape(2, 64, 160, 4, 2, 24, 300, family="gemma2", tied=True),
    "gemma3": Shape(2, 64, 160, 4, 2, 24, 300, family="gemma3", tied=True),
    "qwen3": Shape(2, 64, 160, 4, 2, 24, 300, family="qwen3"),
    "smollm3": Shape(2, 64, 160, 4, 2, 16, 300, tied=True),
    "opt": Shape(2, 64, 160, 4, 4, 16, 300, family="opt", tied=True, positions=130),
}
QV = ("q_proj", "v_proj")
ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Counts of operations of the CPU's attention, which torch doesn't know: those of a GPU's."""


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model_and_as_published(name: str) -> None:
    with torch.device("meta"):
        model = model_of(SHAPES[name], name=name)
    assert footprint.parameters(SHAPES[name]) == sum(w.numel() for w in model.parameters())
    assert footprint.parameters(SHAPES[name]) == PUBLISHED.get(name, footprint.parameters(SHAPES[name]))
    linears = {n.rpartition(".")[2]: (m.in_features, m.out_features) for n, m in model.named_modules() if is_linear(m)}
    assert SHAPES[name].linears == {n: sides for n, sides in linears.items() if n != "lm_head"}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def test_adapters_and_weights_of_llama_2_by_hand() -> None:
    shape, _, aligning, finetuning = footprint.planned("llama2_7b")
    assert footprint.trained(shape, aligning) == 39_976_960  # the official runs'
    assert footprint.trained(shape, finetuning) == 4_194_304
    # 6 476 005 376 weights in linear modules at 4.127 bits, 262 410 240 in tables and norms at 16
    assert footprint.weight_bytes(shape, "nf4") == pytest.approx(3.3406e9 + 0.5248e9, rel=1e-3)
    assert footprint.evaluation_memory(shape, 64, 612) - footprint.weight_bytes(shape, "bfloat16") == 64 * 612 * 524288


@pytest.mark.parametrize("family", SMALL)
def test_weights_gradients_moments_and_anchor_are_exact(family: str) -> None:
    shape = SMALL[family]
    lora = Lora(4, QV)
    net = adapted(model_of(shape, name=family), lora)
    weights = [w for w in net.parameters() if w.requires_grad]
    anchor = snapshot(weights)
    optimizer = torch.optim.AdamW(weights)
    completion_loss(net.get_base_model(), packs_of(Step(40, 40, 1, 5), shape.vocabulary)).backward()
    optimizer.step()
    moments = [optimizer.state[w][name] for w in weights for name in ("exp_avg", "exp_avg_sq")]
    held = [*weights, *(w.grad for w in weights), *moments, *anchor]
    memory = training_memory(shape, lora, Step(40, 40, 1, 5))
    assert memory["weights"] == sum(w.nbytes for w in net.parameters() if not w.requires_grad)
    assert memory["trained"] == sum(t.nbytes for t in held) + 2 * sum(w.numel() for w in weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("family", SMALL)
def test_what_a_layer_keeps(family: str, targets: str, dropout: bool, dtype: str) -> None:
    """The third layer costs what the formula gives to a hundredth, and the whole model to a twentieth."""
    shape = SMALL[family]
    lora = Lora(4, QV if targets == "qv" else tuple(shape.linears), dropout)
    step = Step(tokens=200, width=100, passes=2, supervised=20)
    saved = [saved_bytes(adapted(model_of(replace(shape, layers=n), dtype, family), lora), step) for n in (2, 3)]

    def formula(layers: int) -> float:
        bigger = replace(shape, layers=layers)
        memory = training_memory(bigger, lora, step, dtype)
        head = (6 if family == "gemma2" else 4) * step.supervised * shape.vocabulary
        return memory["activations"] + memory["copies"] + 2 * footprint.trained(bigger, lora) + head

    assert saved[1] - saved[0] == pytest.approx(formula(3) - formula(2), rel=0.01)
    assert saved[1] == pytest.approx(formula(3), rel=0.05)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", SMALL)
def test_what_a_layer_keeps_with_checkpoints_and_of_all_weights(family: str, full: bool) -> None:
    """A third layer keeps its input with checkpoints, and what the formula gives if all weights are trained."""
    shape, step = SMALL[family], Step(tokens=200, width=100, passes=2, supervised=20)
    lora = None if full else Lora(4, QV)
    saved = []
    for layers in (2, 3):
        model = model_of(replace(shape, layers=layers), "float32" if full else "bfloat16", family)
        net = whole(model) if lora is None else adapted(model, lora)
        if not full:
            checkpoint_activations(net.get_base_model())
        saved.append(saved_bytes(net, step))

    def formula(layers: int) -> float:
        bigger = replace(shape, layers=layers)
        copies = 2 * layers * sum(n * out for n, out in shape.linears.values()) if full else 0
        return training_memory(bigger, lora, step, checkpointed=not full)["activations"] + copies

    assert saved[1] - saved[0] == pytest.approx(formula(3) - formula(2), rel=0.01)


def whole(model: Any) -> Any:
    """Return a model whose weights are all trained, with the interface of one with an adapter."""
    model.requires_grad_(True).train().get_base_model = lambda: model
    return model


@pytest.mark.parametrize("full", [False, True])
def test_the_peak_with_checkpoints(full: bool) -> None:
    """The peak of a step without the weights is at most that of the formula, and not far below.

    Gradients of all weights, which are counted, come after the peak.
    """
    shape, step = Shape(6, 128, 320, 4, 4, 32, 300), Step(tokens=512, width=128, passes=4, supervised=300)
    lora = None if full else Lora(4, QV)
    model = model_of(shape, "float32" if full else "bfloat16")
    net = whole(model) if lora is None else adapted(model, lora)
    checkpoint_activations(net.get_base_model())
    packs, live = packs_of(step, shape.vocabulary), Live()
    for weight in net.parameters():
        live.add(weight)
    before = live.now
    with live, autocast_of_a_gpu():
        loss = completion_loss(net.get_base_model(), packs)
        gradients = torch.autograd.grad(loss, [w for w in net.parameters() if w.requires_grad])
    memory = training_memory(shape, lora, step, checkpointed=True)
    state = sum(g.numel() for g in gradients)
    # Without moments and anchor, which need no step.
    expected = memory["activations"] + memory["logits"] + (4 + 2) * state
    assert (0.75 if full else 0.95) * expected <= live.most - before <= expected


def test_sharding_by_hand() -> None:
    shape, _, aligning, _ = footprint.planned("llama3_3_70b_instruct")
    one, eight = (training_memory(shape, aligning, footprint.MAX_STEP_256, devices=n) for n in (1, 8))
    assert one["weights"] == 2 * 70_553_706_496
    layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert eight == one | {"weights": one["weights"] / 8 + 2 * 2 * layer}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["alignment", "fine-tuning"])
@pytest.mark.parametrize("name", ["smollm2_135m", "opt_2_7b", "gemma2_9b"])  # of three families
def test_the_peak_of_a_step_of_the_true_widths(name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of an optimizer step is between 95 and 100 % of the formula.

    The model has four of its layers, and runs op by op on tensors without contents.
    """
    full, _, aligning, finetuning = footprint.planned(name)
    shape, lora = replace(full, layers=4), aligning if stage == "alignment" else finetuning
    step = Step(tokens=512, width=256, passes=2, supervised=300)
    packs = packs_of(step, shape.vocabulary)
    live = Live()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        with monkeypatch.context() as patch:
            patch.setattr(
                nn.Module, "to", lambda module, *_, **__: module
            )  # can't swap such tensors; they are in place
            net = adapted(model_of(shape, name=name), lora)
        for weight in net.parameters():
            live.add(weight)
        for p in packs:
            p.ids, p.mask, p.positions, p.logit_positions, p.targets = map(
                fake.from_tensor, (p.ids, p.mask, p.positions, p.logit_positions, p.targets)
            )
        weights = [w for w in net.parameters() if w.requires_grad]
        with live:
            anchor = snapshot(weights)
            optimizer = torch.optim.AdamW(weights, foreach=True)
            for _ in range(2):  # Adam's moments come with the first step
                optimizer.zero_grad()
                with autocast_of_a_gpu():
                    loss = completion_loss(net.get_base_model(), packs)
                loss.backward()
                optimizer.step()
                del loss
    assert len(anchor) == len(weights)
    memory = training_memory(shape, lora, step)
    beyond = sum(memory.values()) - memory["weights"]
    # Never less than there is; gradients, which are counted, come a moment after the peak.
    assert 0.95 * beyond <= live.most - memory["weights"] <= beyond


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["qv", "all"])
@pytest.mark.parametrize("family", SMALL)
def test_floating_point_operations(family: str, targets: str) -> None:
    shape = SMALL[family]
    lora = Lora(4, QV if targets == "qv" else tuple(shape.linears))
    net = adapted(model_of(shape, name=family), lora)
    step = Step(tokens=200, width=100, passes=2, supervised=20)
    packs = packs_of(step, shape.vocabulary)
    with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as forward, autocast_of_a_gpu():
        loss = completion_loss(net.get_base_model(), packs)
    with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as backward:
        loss.backward()
    expected = footprint.flops(shape, lora, step)
    # Left out of the formula: without an adapter on them, the first layer's keys need no gradient.
    needless = 2 * step.tokens * shape.inner * step.width if (family, targets) == ("gemma2", "qv") else 0
    assert (forward.get_total_flops(), backward.get_total_flops() + needless) == expected


def test_time_by_hand() -> None:
    shape, lora = SHAPES["llama2_7b"], Lora(8, QV)
    arithmetic, launching = footprint.step_seconds(shape, lora, Step(20_000, 200, 2, 1000))
    # 4 operations a frozen weight and token; adapters, attention and the head are a hundredth more
    assert arithmetic == pytest.approx(4 * 6.476e9 * 20_000 / (0.4 * 989e12), rel=0.02)
    assert launching == pytest.approx(2 * 2 * 32 * (0.5e-3 + 2 * 0.1e-3))
    # 16 batches of 64, every token at least 32 launched layers; the prompts' own arithmetic is 4 s more
    seconds = footprint.generation_seconds(shape, prompts=1000, prompt=100, new=512, batch=64)
    assert seconds == pytest.approx(16 * 512 * 32 * 0.5e-3 + 1000 * 100 * 2 * 6.74e9 / (0.4 * 989e12), rel=0.01)


def test_steps_are_what_packing_makes_of_such_rows() -> None:
    def rows(shared: int, length: int, supervised: int) -> list[Example]:
        made = []
        for i in range(BATCH):
            ids = tuple(range(shared)) + tuple(1000 + 997 * i + j for j in range(length + 1 - shared))
            made.append(Example(ids, (IGNORED,) * (len(ids) - supervised) + ids[len(ids) - supervised :]))
        return made

    def step(examples: list[Example]) -> Step:
        packs = pack(examples)
        tokens = [p.ids.numel() for p in packs]
        return Step(sum(tokens), max(tokens), len(packs), sum(len(p.targets) for p in packs))

    assert step(rows(25, 2048, 2000)) == footprint.MAX_STEP_2048
    assert step(rows(25, 256, 200)) == footprint.MAX_STEP_256
    # Four sentences, and the fifth row every second time an answer instead.
    short = step(rows(55, 80, 2))
    assert (short.tokens, short.passes) == (180, 1)
    assert step(rows(25, 120, 75)) == footprint.ALIGNMENT


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(f.stem for f in footprint.MODELS.glob("[!_]*.yaml")))
def test_model_files(name: str, config: Callable[..., DictConfig]) -> None:
    cfg = config(f"model={name}").model
    assert name in SHAPES
    shape, own, aligning, finetuning = footprint.planned(name)
    assert own.id == cfg.id
    assert set(aligning.targets) == set(shape.linears)
    assert finetuning.targets == QV
    assert (cfg.attention == "eager") == (shape.family == "gemma2")


def test_the_page_shows_the_tables() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert footprint.memory_table() in page
    assert footprint.scaling_table() in page
    assert footprint.time_table() in page
