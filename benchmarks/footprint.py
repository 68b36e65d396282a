"""Memory and time that a run needs on one GPU, computed from the shape of the model before it is downloaded.

`python -m benchmarks.footprint` prints the tables of docs/models.md. Start at `training_memory` and `step_seconds`.

- Memory is that of all tensors at the peak of a step, under bfloat16 autocast (`trainer.precision=bf16-mixed`).
  Under `16-mixed`, float16 and bfloat16 change places. Tests compare it with real models.
- Time depends on the assumptions below and has not been measured.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from omegaconf import OmegaConf

from lisa_lightning.config.paths import CONF

MODELS: Final = CONF / "model"
GIB: Final = 2**30

PEAK: Final = 989e12
"""FLOP/s of an H100 (SXM) in bfloat16, dense, by its data sheet."""
UTILISATION: Final = 0.4
"""Share of the peak that matrix products reach, an assumption."""
BANDWIDTH: Final = 3.35e12 * 0.6
"""Bytes/s that generation reads: the 3.35 TB/s of an H100's data sheet, times an assumed share."""
LAYER_S: Final = 0.5e-3
"""Seconds that Python needs at least to launch the forward pass of a layer, an assumption."""
ADAPTER_S: Final = 0.1e-3
"""Seconds to launch the forward pass of a LoRA module, an assumption."""

STORED: Final = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per weight. nf4: 4 bits, a byte for the scale of 64 weights, 4 bytes for 256 scales (double quantization)."""
TRAINED: Final = 4 + 4 + 8 + 4 + 2
"""Bytes per trained weight: value, gradient, Adam's two moments, anchor, autocast's bfloat16 copy."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a decoder, from its public config."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    family: Literal["llama", "qwen2", "qwen3", "gemma2", "gemma3", "opt"] = "llama"
    """Architecture; that of Mistral and SmolLM3 is `llama`."""
    tied: bool = False
    """Whether the head shares the weights of the embedding."""
    positions: int = 0
    """Rows of a learned table of positions."""

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear modules of a layer: name -> (inputs, outputs)."""
        h, i, inner, kv = self.hidden, self.intermediate, self.inner, self.kv_heads * self.head_dim
        attention = {"q_proj": (h, inner), "k_proj": (h, kv), "v_proj": (h, kv)}
        if self.family == "opt":
            return attention | {"out_proj": (inner, h), "fc1": (h, i), "fc2": (i, h)}
        return attention | {"o_proj": (inner, h), "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def norms(self) -> int:
        """Number of normalizations per layer."""
        return 4 if self.family in ("gemma2", "gemma3") else 2

    @property
    def head_norms(self) -> bool:
        """True if each head of the queries and keys is normalized."""
        return self.family in ("qwen3", "gemma3")


SHAPES: Final = {
    "tiny": Shape(2, 32, 64, 4, 4, 8, 259),
    "smollm2_135m": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "qwen2_5_0_5b": Shape(24, 896, 4864, 14, 2, 64, 151936, family="qwen2", tied=True),
    "opt_2_7b": Shape(32, 2560, 10240, 32, 32, 80, 50272, family="opt", tied=True, positions=2050),
    "llama2_7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "mistral_7b": Shape(32, 4096, 14336, 32, 8, 128, 32000),
    "llama3_8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "gemma2_9b": Shape(42, 3584, 14336, 16, 8, 256, 256000, family="gemma2", tied=True),
    "llama3_2_1b": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "smollm3_3b": Shape(36, 2048, 11008, 16, 4, 128, 128256, tied=True),
    "gemma3_4b": Shape(34, 2560, 10240, 8, 4, 256, 262208, family="gemma3", tied=True),
    "qwen3_4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, family="qwen3", tied=True),
    "mistral_7b_v0_3": Shape(32, 4096, 14336, 32, 8, 128, 32768),
    "qwen2_5_7b_instruct": Shape(28, 3584, 18944, 28, 4, 128, 152064, family="qwen2"),
    "llama3_1_8b_instruct": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen3_8b": Shape(36, 4096, 12288, 32, 8, 128, 151936, family="qwen3"),
    "llama3_3_70b_instruct": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}
"""Name in conf/model -> shape."""


@dataclass(frozen=True, slots=True)
class Lora:
    """Rank and adapted linear modules of an adapter, the same in every layer."""

    r: int
    targets: tuple[str, ...]
    dropout: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """Size of the packs of an optimizer step (lisa_lightning/data/packing.py)."""

    tokens: int
    """Number of tokens in all packs. Tokens that rows of a pack share count once."""
    width: int
    """Number of tokens per pack, to which a token may attend."""
    passes: int
    """Number of packs, each a separate forward pass."""
    supervised: int
    """Number of tokens with a label."""


def parameters(shape: Shape) -> int:
    """Return the exact number of weights."""
    outputs = {name: out for name, (_, out) in shape.linears.items()}
    biased = {"opt": tuple(outputs), "qwen2": ("q_proj", "k_proj", "v_proj")}.get(shape.family, ())
    norm = shape.hidden * (2 if shape.family == "opt" else 1)  # a LayerNorm has a bias
    heads = 2 * shape.head_dim if shape.head_norms else 0
    layer = _linear(shape) + sum(outputs[name] for name in biased) + shape.norms * norm + heads
    tables = shape.vocabulary * (1 if shape.tied else 2) + shape.positions
    return shape.layers * layer + shape.hidden * tables + norm


def trained(shape: Shape, lora: Lora) -> int:
    """Return the number of weights of an adapter."""
    return shape.layers * lora.r * _sides(shape, lora)


def weight_bytes(shape: Shape, storage: str) -> float:
    """Return the bytes of the frozen weights.

    Args:
        shape: shape of the model.
        storage: type of the stored weights, a key of `STORED`. With `nf4`, all weights outside the linear modules of
            the layers are bfloat16.
    """
    if storage != "nf4":
        return parameters(shape) * STORED[storage]
    quantized = shape.layers * _linear(shape)
    return quantized * STORED["nf4"] + (parameters(shape) - quantized) * STORED["bfloat16"]


def saved_per_token(shape: Shape, lora: Lora, width: int) -> float:
    """Return the bytes per token that a layer saves for the backward pass, in a pack of `width` tokens."""
    h, i, inner = shape.hidden, shape.intermediate, shape.inner
    # A norm saves its input in float32, the scale, and a LayerNorm also the mean.
    norms = shape.norms * (4 * h + (8 if shape.family == "opt" else 4))
    if shape.head_norms:
        norms += (shape.heads + shape.kv_heads) * (4 * shape.head_dim + 4)
    # Attention saves queries, keys and values. A pack's mask requires keys and values repeated for all heads.
    attention = 3 * 2 * inner
    if shape.family == "gemma2":
        attention += (2 + 4 + 2) * shape.heads * width  # eager: capped logits, probabilities, their bfloat16 copy
    else:
        attention += 2 * inner + 4 * shape.heads  # output, and a float32 per query to recompute the probabilities
    mlp = 2 * i * (1 if shape.family == "opt" else 3)  # OPT: output of the ReLU; others: gate, activated gate, up
    masks = 2 * h if shape.family == "opt" else 0  # dropout of OPT, one byte each
    inputs = [shape.linears[name][0] for name in lora.targets]
    adapters = sum((2 + lora.dropout) * n + 2 * lora.r for n in inputs)  # copy of the input, dropout mask, output of A
    return norms + attention + mlp + masks + adapters


def saved_to_train_all(shape: Shape, width: int) -> float:
    """Return the bytes per token that a layer saves if all weights are trained, in a pack of `width` tokens.

    The weights are float32. Autocast casts the input of each linear module again, and the mask.
    """
    h, inner, kv = shape.hidden, shape.inner, shape.kv_heads * shape.head_dim
    casts = 2 * h * (4 if shape.family == "opt" else 5)  # inputs that come from a norm
    product = 0 if shape.family == "opt" else 2 * shape.intermediate  # input of down_proj
    normalized = 0 if shape.family == "opt" else 4 * h * shape.norms  # for the gradients of the scales
    if shape.head_norms:
        normalized += (4 if shape.family == "gemma3" else 2) * (inner + kv)
    return saved_per_token(shape, Lora(0, (), False), width) + casts + product + normalized + 2 * width


def training_memory(
    shape: Shape,
    lora: Lora | None,
    step: Step,
    storage: str = "bfloat16",
    checkpointed: bool = False,
    devices: int = 1,
) -> dict[str, float]:
    """Return the bytes at the peak of a step on one device, by purpose. The peak is the start of its backward pass.

    Args:
        shape: shape of the model.
        lora: adapter that is trained; None for all weights, which are float32.
        step: packs of the step.
        storage: type of the stored frozen weights, a key of `STORED`. In every forward pass, autocast copies float32
            and float16 weights and the mask to bfloat16. The copies are saved for the backward pass.
        checkpointed: with `trainer.activation_checkpointing`, layers save their inputs. One is repeated at a time.
        devices: number of devices over which the frozen weights are sharded. Two layers are whole at a time.
    """
    storage = "float32" if lora is None else storage
    # One layer of one pack is repeated at a time.
    layers, tokens, passes = (
        (1, step.tokens / step.passes, 1) if checkpointed else (shape.layers, step.tokens, step.passes)
    )
    copied = 0.0
    if storage in ("float32", "float16") and lora is not None:
        copied = passes * layers * _linear(shape) + step.passes * shape.hidden * shape.vocabulary
        copied += 0 if shape.family == "gemma2" else layers * tokens * step.width
    saved = saved_to_train_all(shape, step.width) if lora is None else saved_per_token(shape, lora, step.width)
    activations = layers * tokens * saved
    if checkpointed:
        activations += shape.layers * step.tokens * shape.hidden * (4 if storage == "float32" else 2)
        # Gradients in the repeated layer: of the MLP's intermediate values, and of hidden states.
        activations += tokens * (3 * 2 * shape.intermediate + 8 * shape.hidden)
    capped = 2 if shape.family == "gemma2" else 0
    # Log-probabilities are saved for all packs, their gradient and that of the logits for one pack at a time.
    logits = (4 + capped) * step.supervised + (4 + 4) * math.ceil(step.supervised / step.passes)
    return {
        "weights": 0.0 if lora is None else _sharded(shape, storage, devices),
        "copies": 2.0 * copied,
        "trained": float(TRAINED * (parameters(shape) if lora is None else trained(shape, lora))),
        "activations": activations,
        "logits": float(shape.vocabulary * logits),
    }


def _sharded(shape: Shape, storage: str, devices: int) -> float:
    """Return the bytes of the frozen weights on one of several devices, with two whole layers."""
    weights = weight_bytes(shape, storage)
    whole = 2 * _linear(shape) * STORED[storage]
    return weights if devices == 1 else min(weights, weights / devices + whole)


def evaluation_memory(shape: Shape, rows: int, tokens: int, storage: str = "bfloat16") -> float:
    """Return the bytes of the weights, and of the keys and values of answers.

    Args:
        shape: shape of the model.
        rows: number of answers that are generated together.
        tokens: number of tokens per answer, including the prompt.
        storage: type of the stored weights, a key of `STORED`.
    """
    return weight_bytes(shape, storage) + rows * tokens * _cache(shape)


def flops(shape: Shape, lora: Lora, step: Step) -> tuple[float, float]:
    """Return the floating-point operations of a step's forward and of its backward passes.

    Only matrix products and attention count.

    - Frozen weights have no gradient, so a backward pass has one product with them instead of two.
    - The inputs of the first layer need no gradient.
    - The backward pass of attention computes the probabilities again, except in Gemma 2, which saves them.

    Args:
        shape: shape of the model.
        lora: adapter that is trained.
        step: packs of the step.
    """
    frozen = 2 * step.tokens * shape.layers * _linear(shape) + 2 * shape.hidden * shape.vocabulary * step.supervised
    adapters = 2 * step.tokens * trained(shape, lora)
    attention = 4 * step.tokens * shape.layers * shape.inner * step.width
    first = [shape.linears[name] for name in ("q_proj", "k_proj", "v_proj")]
    adapted = [shape.linears[name][0] for name in ("q_proj", "k_proj", "v_proj") if name in lora.targets]
    needless = 2 * step.tokens * (sum(n * out for n, out in first) + lora.r * sum(adapted))
    backward_factor = 2.0 if shape.family == "gemma2" else 2.5
    return frozen + adapters + attention, frozen + 2 * adapters + backward_factor * attention - needless


def step_seconds(shape: Shape, lora: Lora, step: Step) -> tuple[float, float]:
    """Return the seconds of a training step's arithmetic, and of launching it. The longer one is expected.

    Args:
        shape: shape of the model.
        lora: adapter that is trained.
        step: packs of the step.
    """
    launching = 2 * step.passes * shape.layers * (LAYER_S + len(lora.targets) * ADAPTER_S)
    return sum(flops(shape, lora, step)) / (PEAK * UTILISATION), launching


def generation_seconds(
    shape: Shape, prompts: int, prompt: int, new: int, batch: int, storage: str = "bfloat16"
) -> float:
    """Return an upper bound of the expected seconds of generation: that of answers with all `new` tokens.

    Args:
        shape: shape of the model.
        prompts: number of prompts.
        prompt: number of tokens of a prompt.
        new: number of new tokens of an answer.
        batch: number of prompts that are answered together.
        storage: type of the stored weights, a key of `STORED`.
    """
    read = weight_bytes(shape, storage) + batch * (prompt + new / 2) * _cache(shape)
    product = 2 * parameters(shape) / (PEAK * UTILISATION)
    token = max(shape.layers * LAYER_S, read / BANDWIDTH, batch * product)
    return math.ceil(prompts / batch) * new * token + prompts * prompt * product


def _linear(shape: Shape) -> int:
    return sum(n * out for n, out in shape.linears.values())


def _sides(shape: Shape, lora: Lora) -> int:
    return sum(sum(shape.linears[name]) for name in lora.targets)


def _cache(shape: Shape) -> int:
    """Return the bytes of the keys and values of a token."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


# The SST-2 experiment of the Lisa paper, in batches of five rows.
BATCH: Final = 5
MAX_STEP_256: Final = Step(tokens=BATCH * 256, width=256, passes=BATCH, supervised=BATCH * 200)
"""Largest step with data.max_length=256."""
MAX_STEP_2048: Final = Step(tokens=BATCH * 2048, width=2048, passes=BATCH, supervised=BATCH * 2000)
"""Largest step with data.max_length=2048."""
ALIGNMENT: Final = Step(tokens=525, width=310, passes=2, supervised=375)
"""Usual step on safety answers."""
USER: Final = Step(tokens=230, width=230, passes=1, supervised=45)
"""Usual step on sentences, with a harmful answer in every second one."""
ALIGNING_STEPS: Final = 60_000
USER_STEPS: Final = 18_000
GUIDED_STEPS: Final = 2_000
"""Fine-tuning steps in Lisa's alignment state."""
QUESTIONS: Final = ((1000, 512), (872, 200))
"""(prompts, new tokens) of the harmful score and of the accuracy on SST-2."""
PROMPT: Final = 100
"""Tokens of a prompt."""
ANSWERS: Final = 64
"""Answers generated together (`evaluate.batch_size`)."""


def planned(name: str) -> tuple[Shape, Any, Lora, Lora]:
    """Return shape and config of a model, and the paper's adapters for aligning (r=16) and fine-tuning (r=8).

    Args:
        name: name in conf/model, a key of `SHAPES`.
    """
    shape, files = SHAPES[name], (MODELS / f"{file}.yaml" for file in ("_shared", name))
    cfg: Any = OmegaConf.merge(*map(OmegaConf.load, files))
    aligning, finetuning = (
        tuple(shape.linears) if targets == "all-linear" else tuple(targets)
        for targets in (cfg.align_targets, cfg.finetune_targets)
    )
    return shape, cfg, Lora(16, aligning), Lora(8, finetuning)


def _hub_models() -> Iterator[tuple[str, Shape, Any, Lora, Lora]]:
    """Yield name and plan of each model that has an id."""
    for name in SHAPES:
        plan = planned(name)
        if plan[1].id is not None:
            yield name, *plan


def memory_table() -> str:
    """Return peak memory in GiB as a Markdown table: of training with the longest rows, and of evaluation."""
    lines = [
        "| model | parameters | weights | fine-tuning, 256 | fine-tuning, 2048 | alignment, 256 | alignment, 2048 "
        "| evaluation | fine-tuning, 256, nf4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, shape, cfg, aligning, finetuning in _hub_models():
        trainings = [
            *((lora, step, cfg.dtype) for lora in (finetuning, aligning) for step in (MAX_STEP_256, MAX_STEP_2048)),
            (finetuning, MAX_STEP_256, "nf4"),
        ]
        *peaks, quantized = (sum(training_memory(shape, *training).values()) for training in trainings)
        evaluation = evaluation_memory(shape, ANSWERS, PROMPT + max(new for _, new in QUESTIONS), cfg.dtype)
        columns = [weight_bytes(shape, cfg.dtype), *peaks, evaluation, quantized]
        lines.append(f"| `{name}` | {parameters(shape):,} | " + " | ".join(f"{b / GIB:.1f}" for b in columns) + " |")
    return "\n".join(lines)


def scaling_table() -> str:
    """Return peak memory in GiB of a device as a Markdown table: with checkpoints, of all weights, and sharded."""
    lines = [
        "| model | alignment, 256, checkpoints | alignment, 2048, checkpoints | all weights, 256 "
        "| all weights, 256, checkpoints | alignment, 256, checkpoints, sharded over 8 |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape, cfg, aligning, _ in _hub_models():
        peaks = (
            training_memory(shape, aligning, MAX_STEP_256, cfg.dtype, checkpointed=True),
            training_memory(shape, aligning, MAX_STEP_2048, cfg.dtype, checkpointed=True),
            training_memory(shape, None, MAX_STEP_256),
            training_memory(shape, None, MAX_STEP_256, checkpointed=True),
            training_memory(shape, aligning, MAX_STEP_256, cfg.dtype, checkpointed=True, devices=8),
        )
        lines.append(f"| `{name}` | " + " | ".join(f"{sum(p.values()) / GIB:.1f}" for p in peaks) + " |")
    return "\n".join(lines)


def time_table() -> str:
    """Return times as a Markdown table: of a step in milliseconds, of the paper's stages in hours.

    Two models are evaluated, the aligned one and the fine-tuned one.
    """
    lines = [
        "| model | alignment step, ms: arithmetic, launching | user step, ms: arithmetic, launching "
        "| alignment, h | fine-tuning, h | evaluation, h | together, h |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, shape, cfg, aligning, finetuning in _hub_models():
        steps = [(aligning, ALIGNMENT), (finetuning, USER), (finetuning, ALIGNMENT)]
        aligned, user, guided = (step_seconds(shape, lora, step) for lora, step in steps)
        stages = [
            ALIGNING_STEPS * max(aligned),
            USER_STEPS * max(user) + GUIDED_STEPS * max(guided),
            2 * sum(generation_seconds(shape, n, PROMPT, new, ANSWERS, cfg.dtype) for n, new in QUESTIONS),
        ]
        milliseconds = " | ".join(", ".join(f"{1000 * s:.0f}" for s in step) for step in (aligned, user))
        hours = " | ".join(f"{s / 3600:.1f}" for s in (*stages, sum(stages)))
        lines.append(f"| `{name}` | {milliseconds} | {hours} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table(), scaling_table(), time_table(), sep="\n\n")
