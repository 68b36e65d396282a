"""Reads a golden case: its model, method, optimizer, batches and rows, as this project has them.

`facts` is the case's JSON, `tensors` its safetensors.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pydantic.dataclasses import dataclass
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.paths import CONF
from lisa_lightning.config.fields import STRICT
from lisa_lightning.config.optim import Optim
from lisa_lightning.config.settings import Lora
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import IGNORED, Example, Pack, pack, pack_padded
from lisa_lightning.data.schedule import Stream
from lisa_lightning.method.base import Method
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import PREFIX, trainable
from lisa_lightning.model.lora import attach
from lisa_lightning.objective.backprop import IterStream


def tiny_model(facts: dict[str, Any], tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """Return the case's Llama without its adapter."""
    sizes = dict(facts["model"])
    theta = sizes.pop("rope_theta", 10000.0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": theta}))
    whole = "aligned." if "aligned.lm_head.weight" in tensors else "base."
    model.load_state_dict({k.removeprefix(whole): v for k, v in tensors.items() if k.startswith(whole)}, strict=True)
    return model


def tiny_net(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Return the case's Llama with its adapter, whose LoRA factors have their values at the start."""
    model = tiny_model(facts, tensors)
    lora = facts["lora"]
    targets = list(lora["targets"])
    net = attach(model, Lora(r=lora["r"], alpha=lora["alpha"], dropout=lora.get("dropout", 0.0), targets=targets), 0)
    initial = {k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")}
    own = trainable(net)
    if own.keys() != initial.keys():
        raise ValueError(f"adapter weights differ: {sorted(own.keys() ^ initial.keys())[:4]}")
    with torch.no_grad():
        for name, value in initial.items():
            own[name].copy_(value)
    return net


ELSEWHERE = {
    "beta": ("lamb", "beta"),
    "lamb": ("lamb", "lambda_reg"),
    "safe_rows": ("alignment_batch_size",),
    "rho": ("rho",),
    "safety_rank": ("safe_rank",),
    "seed": ("seed",),
    "first_factor": ("first_token_bias_factor",),
    "attacks": ("tasks_sampled",),
    "subsample": ("inner_subsample",),
    "grad_scale": ("tamper_resistance_grad_scale",),
    "representations": ("retain_representations",),
    "tau": ("safe_tau",),
    "delta": ("safe_tolerance",),
    "clip": ("max_grad_norm",),
}
"""Argument -> the names that a case may use for it, where they may differ."""
OFFICIAL = {
    "carry_over": True,
    "official": True,
    "padding": True,
    "per_micro_batch": True,
    "add_back": True,
    "all_positions": True,
}
"""Switches of behaviour that only the official code has. They are on unless a case says otherwise."""


def method_of(facts: dict[str, Any]) -> Method:
    """Return the method of a case by its own name, through conf/ as in a run."""
    name = {"tvaccine": "t_vaccine"}.get(facts["method"], facts["method"])
    stage = "method" if (CONF / "method" / f"{name}.yaml").exists() else "align"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("config", [f"{stage}={name}"])
    cfg = whole.method if stage == "method" else whole.align.method
    given = {}
    for key in cfg:
        for called in ELSEWHERE.get(key, (key,)):
            if called in facts:
                given[key] = facts[called]
    if name == "booster":
        given["rho"] *= facts.get("perturb_aware", False)  # else the case's rho is of the trainer's other methods
    if name == "tar":
        given["schedule_lambda"] = facts["schedule_lambda"] if facts["use_weighting_schedule"] else None
        given["lower_bound"] = None if facts["unbounded"] else facts["lower_bound"]
    return instantiate(cfg, **({k: v for k, v in OFFICIAL.items() if k in cfg} | given))


@dataclass(frozen=True, config=STRICT)
class Rates(Optim):
    """Optimizer of a case. AsFT's rate falls by gamma after each epoch, SPPFT's rises over a fixed number of steps."""

    gamma: float = 1.0
    epoch: int = 1
    warmup_steps: int = 0

    @classmethod
    def of_case(cls, facts: dict[str, Any], steps: int) -> "Rates":
        """Return the optimizer of a case from its JSON."""
        schedule = facts.get("lr_scheduler", "constant")
        if schedule not in ("constant", "linear", "cosine"):
            raise ValueError(f"lr_scheduler={schedule} is none that this project has")
        return cls(
            lr=facts["lr"],
            steps=steps,
            batch_size=facts["batch_size"],
            accumulate=1,
            clip=facts["max_grad_norm"],
            schedule=schedule,
            warmup_ratio=_warmup_ratio(facts, steps),
            weight_decay=facts["weight_decay"],
            betas=tuple(facts["betas"]),
            eps=facts["eps"],
            gamma=facts.get("gamma", 1.0),
            epoch=-(-facts.get("steps_per_epoch", steps) // accumulated(facts)),
            warmup_steps=facts.get("warmup_steps", 0),
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a 0-based step."""
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        return super().lr_at(step) * self.gamma ** (step // self.epoch)


def _warmup_ratio(facts: dict[str, Any], steps: int) -> float:
    if "warmup_steps" in facts:  # which `Rates` counts itself
        return 0.0
    return facts.get("lr_warmup_ratio", facts.get("lr_warmup_steps", 0) / facts.get("rounds", steps))


def accumulated(facts: dict[str, Any]) -> int:
    return facts.get("gradient_accumulation", 1)


def groups_of(facts: dict[str, Any]) -> list[list[int]]:
    """Return the recorded batches of each optimizer step. The last step of an epoch may have fewer."""
    count = facts.get("total_steps") or len(facts["steps"])
    epoch, size = facts.get("steps_per_epoch", count), accumulated(facts)
    starts = [start + i for start in range(0, count, epoch) for i in range(0, min(epoch, count - start), size)]
    ends = [min(start + size, (start // epoch + 1) * epoch, count) for start in starts]
    return [list(range(start, end)) for start, end in zip(starts, ends, strict=True)]


def step_of(tensors: dict[str, Tensor], t: int, total: int, batches: list[int], method: Method) -> Step:
    recorded = {"alignment": "alignment", "user": "user", "defender": "harmful"}
    return Step(
        t,
        total,
        {
            name: batch_of(tensors, [f"step{i:03d}.{recorded[name]}" for i in batches], name, method)
            for name in method.plan(t)
        },
    )


def batch_of(tensors: dict[str, Tensor], prefixes: list[str], stream: Stream, method: Method) -> Batch:
    micro, tokens = [], 0
    for prefix in prefixes:
        ids, labels, mask = (tensors[f"{prefix}.{name}"] for name in ("input_ids", "labels", "attention_mask"))
        tokens += int((labels[:, 1:] != IGNORED).sum())
        if stream in method.unpacked_streams:  # padding as it was recorded
            micro.append([pack_padded(ids, mask.bool(), labels)])
        else:
            micro.append(pack(examples(ids, labels, mask.bool())))
    return Batch(stream, micro, tokens)


def examples(ids: Tensor, labels: Tensor, mask: Tensor) -> list[Example]:
    """Return rows without their padding."""
    return [
        Example(tuple(i[m].tolist()), tuple(label[m].tolist())) for i, label, m in zip(ids, labels, mask, strict=True)
    ]


def whole_streams(tensors: dict[str, Tensor]) -> IterStream:
    """Return the reader of whole streams.

    These are the rows with which SaLoRA begins, the prompts of SBR's anchors, or the batches of EWC's Fisher sum.
    """
    if any(name.startswith("safety") for name in tensors):
        return _calibration_rows(tensors)
    prefixes = sorted({k.rpartition(".")[0] for k in tensors if k.startswith("fisher") and k.endswith(".input_ids")})
    names = ("input_ids", "labels", "attention_mask")

    def whole(stream: Stream, size: int, padded: bool, rows: int | None) -> Iterator[Batch]:
        if stream == "defender":
            ids, mask = tensors["anchor.input_ids"], tensors["anchor.attention_mask"].bool()
            prompts = [tuple(i[m].tolist()) for i, m in zip(ids, mask, strict=True)]
            answered = [Example((*prompt, 0), (*[IGNORED] * len(prompt), 0)) for prompt in prompts]
            yield Batch(stream, [pack(answered)], len(answered))
        for prefix in prefixes:
            ids, labels, mask = (tensors[f"{prefix}.{name}"] for name in names)
            yield Batch(stream, [pack(examples(ids, labels, mask.bool()))], int((labels[:, 1:] != IGNORED).sum()))

    return whole


def _calibration_rows(tensors: dict[str, Tensor]) -> IterStream:
    recorded = {"alignment": "safety", "user": "task"}

    def whole(stream: Stream, size: int, padded: bool, rows: int | None) -> Iterator[Batch]:
        packs = rows_of(tensors, recorded[stream])
        yield Batch(stream, [[pack] for pack in packs], sum(len(pack.targets) for pack in packs))

    return whole


def deltas_of(tensors: dict[str, Tensor]) -> dict[str, Delta]:
    """Return V of every adapted matrix from both models' weights, or nothing if the case has one model."""
    if not any(k.startswith("aligned.") for k in tensors):
        return {}
    before, after = (
        {k.removeprefix(f"{which}."): v for k, v in tensors.items() if k.startswith(f"{which}.")}
        for which in ("base", "aligned")
    )
    names = {k.partition(".lora_")[0].removeprefix(f"init.{PREFIX}") for k in tensors if k.startswith("init.")}
    return dense_deltas(after, before, names)


def dense_deltas(aligned: dict[str, Tensor], base: dict[str, Tensor], modules: Iterable[str]) -> dict[str, Delta]:
    """Return the deltas, as [d_out, d_in], of those `modules` whose weights differ between two models."""
    names = {module: f"{module}.weight" for module in modules}
    found = {m: Delta(aligned[n].float() - base[n].float()) for m, n in names.items() if n in aligned and n in base}
    return {module: delta for module, delta in found.items() if delta.norm > 0}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names have a prefix, and remove it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def rows_of(tensors: dict[str, Tensor], stream: str) -> list[Pack]:
    names = sorted(name.removesuffix(".input_ids") for name in tensors if name.endswith(f".{stream}.input_ids"))
    found = []
    for name in names:
        ids, labels = tensors[f"{name}.input_ids"], tensors[f"{name}.labels"]
        mask = tensors.get(f"{name}.attention_mask", torch.ones_like(ids)).bool()
        found.append(pack_padded(ids, mask, labels))
    return found
