"""What a run needs of one GPU, memory and time, from a model's shape: to plan with before anything is fetched.

`python -m benchmarks.footprint` prints the tables of docs/models.md. Memory is what tensors hold at the worst
moment of a step, under bfloat16 autocast (`trainer.precision=bf16-mixed`) and without gradient checkpointing; tests
check it against models that are really built. Time rests on the assumptions named here and has not been measured.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

from omegaconf import OmegaConf

from lisa_lightning.config.paths import CONF

MODELS: Final = CONF / "model"
GIB: Final = 2**30

PEAK: Final = 989e12
"""FLOP/s of an H100 (SXM) in bfloat16, dense: its data sheet."""
UTILISATION: Final = 0.4
"""Share of the peak that matrix products reach: assumed."""
BANDWIDTH: Final = 3.35e12 * 0.6
"""Bytes/s that generation reads: an H100's 3.35 TB/s (its data sheet) times a share that is assumed."""
LAYER_S: Final = 0.5e-3
"""Seconds that Python needs to launch one layer's forward pass, however little there is to compute: assumed."""
ADAPTER_S: Final = 0.1e-3
"""The same of one LoRA module."""

STORED: Final = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256)}
"""Bytes a weight. nf4: 4 bits, a byte for the scale of 64 weights, 4 bytes for 256 scales (double quantization)."""
TRAINED: Final = 4 + 4 + 8 + 4 + 2
"""Bytes a trained weight: itself, its gradient, Adam's two moments, the anchor, autocast's bfloat16 copy."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder as its public config describes it. `family` is its architecture; Mistral's is llama's."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    family: Literal["llama", "qwen2", "gemma2", "opt"] = "llama"
    tied: bool = False
    """Whether the head is the embedding."""
    positions: int = 0
    """Rows of a learned table of positions."""

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_dim

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of a layer's linear modules."""
        h, i, inner, kv = self.hidden, self.intermediate, self.inner, self.kv_heads * self.head_dim
        attention = {"q_proj": (h, inner), "k_proj": (h, kv), "v_proj": (h, kv)}
        if self.family == "opt":
            return attention | {"out_proj": (inner, h), "fc1": (h, i), "fc2": (i, h)}
        return attention | {"o_proj": (inner, h), "gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}

    @property
    def norms(self) -> int:
        """Normalizations a layer."""
        return 4 if self.family == "gemma2" else 2


SHAPES: Final = {
    "tiny": Shape(2, 32, 64, 4, 4, 8, 259),
    "smollm2_135m": Shape(30, 576, 1536, 9, 3, 64, 49152, tied=True),
    "qwen2_5_0_5b": Shape(24, 896, 4864, 14, 2, 64, 151936, family="qwen2", tied=True),
    "opt_2_7b": Shape(32, 2560, 10240, 32, 32, 80, 50272, family="opt", tied=True, positions=2050),
    "llama2_7b": Shape(32, 4096, 11008, 32, 32, 128, 32000),
    "mistral_7b": Shape(32, 4096, 14336, 32, 8, 128, 32000),
    "llama3_8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "gemma2_9b": Shape(42, 3584, 14336, 16, 8, 256, 256000, family="gemma2", tied=True),
}
"""conf/model's names -> shapes, from the models' public configs."""


@dataclass(frozen=True, slots=True)
class Lora:
    """An adapter: rank and the names of the linear modules it sits on, in every layer."""

    r: int
    targets: tuple[str, ...]
    dropout: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """What an optimizer step computes on (lisa_lightning/data/packing.py)."""

    tokens: int
    """In all packs together; tokens that rows of a pack share count once."""
    width: int
    """Tokens a pack: what a token may attend to."""
    passes: int
    """Packs, each a forward pass of its own."""
    supervised: int
    """Tokens with a label."""


def parameters(shape: Shape) -> int:
    """The number of weights, exactly."""
    outputs = {name: out for name, (_, out) in shape.linears.items()}
    biased = {"opt": tuple(outputs), "qwen2": ("q_proj", "k_proj", "v_proj")}.get(shape.family, ())
    norm = shape.hidden * (2 if shape.family == "opt" else 1)  # a LayerNorm has a bias
    layer = _linear(shape) + sum(outputs[name] for name in biased) + shape.norms * norm
    tables = shape.vocabulary * (1 if shape.tied else 2) + shape.positions
    return shape.layers * layer + shape.hidden * tables + norm


def trained(shape: Shape, lora: Lora) -> int:
    """The number of weights of an adapter."""
    return shape.layers * lora.r * _sides(shape, lora)


def weight_bytes(shape: Shape, kept: str) -> float:
    """Bytes of the frozen weights. 4-bit ones are the layers' linear modules alone; the rest is bfloat16."""
    if kept != "nf4":
        return parameters(shape) * STORED[kept]
    quantized = shape.layers * _linear(shape)
    return quantized * STORED["nf4"] + (parameters(shape) - quantized) * STORED["bfloat16"]


def saved_per_token(shape: Shape, lora: Lora, width: int) -> float:
    """Bytes that a layer keeps of one token for the backward pass, in a pack of `width` tokens."""
    h, i, inner = shape.hidden, shape.intermediate, shape.inner
    norms = shape.norms * (4 * h + (8 if shape.family == "opt" else 4))  # input in float32; mean and scale, or scale
    attention = 3 * 2 * inner  # queries, keys and values; under a pack's mask the latter are repeated for all heads
    if shape.family == "gemma2":
        attention += (2 + 4 + 2) * shape.heads * width  # eager: capped logits, probabilities, those in bfloat16
    else:
        attention += 2 * inner + 4 * shape.heads  # its output, and a float32 for every query to recompute the rest by
    mlp = 2 * i * (1 if shape.family == "opt" else 3)  # OPT: after the ReLU; else: gate, activated gate, up
    masks = 2 * h if shape.family == "opt" else 0  # OPT's own dropout, a byte each
    inputs = [shape.linears[name][0] for name in lora.targets]
    adapters = sum((2 + lora.dropout) * n + 2 * lora.r for n in inputs)  # a copy of the input, mask; what A gives
    return norms + attention + mlp + masks + adapters


def training_memory(shape: Shape, lora: Lora, step: Step, kept: str = "bfloat16") -> dict[str, float]:
    """Bytes at the start of a step's backward pass, its peak, by what holds them.

    Args:
        kept: how the frozen weights are stored, a key of `STORED`. Autocast copies float32 and float16 ones to
            bfloat16, and the mask, anew in every forward pass, and keeps the copies for the backward pass.
    """
    copied = 0
    if kept in ("float32", "float16"):
        copied = step.passes * (shape.layers * _linear(shape) + shape.hidden * shape.vocabulary)
        copied += 0 if shape.family == "gemma2" else shape.layers * step.tokens * step.width
    capped = 2 if shape.family == "gemma2" else 0
    # All packs' log-probabilities are kept; their gradient, and that of the logits, are held for one pack at a time.
    logits = (4 + capped) * step.supervised + (4 + 4) * math.ceil(step.supervised / step.passes)
    return {
        "weights": weight_bytes(shape, kept),
        "copies": 2.0 * copied,
        "trained": float(TRAINED * trained(shape, lora)),
        "activations": shape.layers * step.tokens * saved_per_token(shape, lora, step.width),
        "logits": float(shape.vocabulary * logits),
    }


def evaluation_memory(shape: Shape, rows: int, tokens: int, kept: str = "bfloat16") -> float:
    """Bytes of the weights and of the keys and values of `rows` answers, `tokens` each with their prompts."""
    return weight_bytes(shape, kept) + rows * tokens * _cache(shape)


def flops(shape: Shape, lora: Lora, step: Step) -> tuple[float, float]:
    """Floating point operations of a step's forward and backward passes, matrix products and attention alone.

    Frozen weights have no gradient, so the backward pass costs them one product, not two; and the first layer's inputs
    need none. Attention's backward pass computes its probabilities again (not Gemma 2's, which keeps them).
    """
    frozen = 2 * step.tokens * shape.layers * _linear(shape) + 2 * shape.hidden * shape.vocabulary * step.supervised
    adapters = 2 * step.tokens * trained(shape, lora)
    attention = 4 * step.tokens * shape.layers * shape.inner * step.width
    first = [shape.linears[name] for name in ("q_proj", "k_proj", "v_proj")]
    adapted = [shape.linears[name][0] for name in ("q_proj", "k_proj", "v_proj") if name in lora.targets]
    needless = 2 * step.tokens * (sum(n * out for n, out in first) + lora.r * sum(adapted))
    again = 2.0 if shape.family == "gemma2" else 2.5
    return frozen + adapters + attention, frozen + 2 * adapters + again * attention - needless


def step_seconds(shape: Shape, lora: Lora, step: Step) -> tuple[float, float]:
    """Seconds of a training step's arithmetic, and of launching it; the longer of the two is what is expected."""
    launching = 2 * step.passes * shape.layers * (LAYER_S + len(lora.targets) * ADAPTER_S)
    return sum(flops(shape, lora, step)) / (PEAK * UTILISATION), launching


def generation_seconds(shape: Shape, prompts: int, prompt: int, new: int, batch: int, kept: str = "bfloat16") -> float:
    """Expected time at most: as if every answer had all `new` tokens, after `prompt` ones, `batch` rows at a time."""
    read = weight_bytes(shape, kept) + batch * (prompt + new / 2) * _cache(shape)
    product = 2 * parameters(shape) / (PEAK * UTILISATION)
    token = max(shape.layers * LAYER_S, read / BANDWIDTH, batch * product)
    return math.ceil(prompts / batch) * new * token + prompts * prompt * product


def _linear(shape: Shape) -> int:
    return sum(n * out for n, out in shape.linears.values())


def _sides(shape: Shape, lora: Lora) -> int:
    return sum(sum(shape.linears[name]) for name in lora.targets)


def _cache(shape: Shape) -> int:
    """Bytes that a token's keys and values take."""
    return 2 * 2 * shape.layers * shape.kv_heads * shape.head_dim


# The Lisa paper's cell of SST-2, in batches of five rows. LONG and LONGEST are the largest steps that 256 and 2048 as
# data.max_length allow. The others are usual ones: safety answers; sentences, and one harmful answer every second time.
BATCH: Final = 5
LONG: Final = Step(tokens=BATCH * 256, width=256, passes=BATCH, supervised=BATCH * 200)
LONGEST: Final = Step(tokens=BATCH * 2048, width=2048, passes=BATCH, supervised=BATCH * 2000)
ALIGNMENT: Final = Step(tokens=525, width=310, passes=2, supervised=375)
USER: Final = Step(tokens=230, width=230, passes=1, supervised=45)
ALIGNING_STEPS: Final = 60_000
USER_STEPS: Final = 18_000
GUIDED_STEPS: Final = 2_000
"""Fine-tuning steps in Lisa's alignment state."""
QUESTIONS: Final = ((1000, 512), (872, 200))
"""(prompts, new tokens) of the harmful score and of SST-2's accuracy."""
PROMPT: Final = 100
ANSWERS: Final = 64
"""Rows generated together (`evaluate.batch_size`)."""


def planned(name: str) -> tuple[Shape, Any, Lora, Lora]:
    """Shape and config (conf/model) of a model, and the paper's adapters for aligning (r=16) and fine-tuning (r=8)."""
    shape, files = SHAPES[name], (MODELS / f"{file}.yaml" for file in ("_shared", name))
    cfg: Any = OmegaConf.merge(*map(OmegaConf.load, files))
    aligning, finetuning = (
        tuple(shape.linears) if targets == "all-linear" else tuple(targets)
        for targets in (cfg.align_targets, cfg.finetune_targets)
    )
    return shape, cfg, Lora(16, aligning), Lora(8, finetuning)


def memory_table() -> str:
    """Markdown, in GiB: peaks of training with the longest rows that 256 and 2048 tokens allow, and of evaluation."""
    lines = [
        "| model | parameters | weights | fine-tuning, 256 | fine-tuning, 2048 | alignment, 256 | alignment, 2048 "
        "| evaluation | fine-tuning, 256, nf4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        shape, cfg, aligning, finetuning = planned(name)
        if cfg.id is None:
            continue
        trainings = [
            *((lora, step, cfg.dtype) for lora in (finetuning, aligning) for step in (LONG, LONGEST)),
            (finetuning, LONG, "nf4"),
        ]
        *peaks, quantized = (sum(training_memory(shape, *training).values()) for training in trainings)
        asking = evaluation_memory(shape, ANSWERS, PROMPT + max(new for _, new in QUESTIONS), cfg.dtype)
        held = [weight_bytes(shape, cfg.dtype), *peaks, asking, quantized]
        lines.append(f"| `{name}` | {parameters(shape):,} | " + " | ".join(f"{b / GIB:.1f}" for b in held) + " |")
    return "\n".join(lines)


def time_table() -> str:
    """Markdown: a step's arithmetic and launching in milliseconds, the stages of the paper's cell in hours.

    Two models are evaluated, the aligned one and the fine-tuned one.
    """
    lines = [
        "| model | alignment step, ms: arithmetic, launching | user step, ms: arithmetic, launching "
        "| alignment, h | fine-tuning, h | evaluation, h | together, h |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in SHAPES:
        shape, cfg, aligning, finetuning = planned(name)
        if cfg.id is None:
            continue
        steps = [(aligning, ALIGNMENT), (finetuning, USER), (finetuning, ALIGNMENT)]
        aligned, user, guided = (step_seconds(shape, lora, step) for lora, step in steps)
        stages = [
            ALIGNING_STEPS * max(aligned),
            USER_STEPS * max(user) + GUIDED_STEPS * max(guided),
            2 * sum(generation_seconds(shape, n, PROMPT, new, ANSWERS, cfg.dtype) for n, new in QUESTIONS),
        ]
        parts = " | ".join(", ".join(f"{1000 * s:.0f}" for s in step) for step in (aligned, user))
        hours = " | ".join(f"{s / 3600:.1f}" for s in (*stages, sum(stages)))
        lines.append(f"| `{name}` | {parts} | {hours} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_table(), time_table(), sep="\n\n")
