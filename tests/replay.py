"""Replays golden cases (what the official implementations did, batch by batch) through this project's own code.

    python tests/replay.py PATH/TO/lisa [PATH/TO/booster ...]

A case is the path of a golden file without its ending; its JSON names the method. One line a case: name, then the
largest error of each thing that the case records; exit status 1 where one exceeds the case's tolerance.
"""

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lisa_lightning.alignment_delta import Delta, dense_deltas
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import IGNORED, Example, Pack, pack, padded
from lisa_lightning.loss import completion_loss
from lisa_lightning.methods.asft import AsFT, distance
from lisa_lightning.methods.method import Method
from lisa_lightning.methods.repnoise import RepNoise
from lisa_lightning.methods.t_vaccine import TVaccine
from lisa_lightning.module import LisaModule, Optim
from lisa_lightning.net import PREFIX, attach, modules, trainable
from lisa_lightning.passes import Passes, Share
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.nlsr import Nlsr
from lisa_lightning.repair.repair import Factors, Given
from lisa_lightning.repair.safe_lora import SafeLora
from lisa_lightning.schedule import Stream

CONF = Path(__file__).parents[1] / "conf"
TOLERANCES = {"booster": 3e-5, "repnoise": 5e-6, "ldifs": 5e-5, "nlsr": 2e-6}
"""Of weights, absolute; of everything else relative to max(1, value). Others have 1e-6."""


@dataclass
class Errors:
    """What a replayed case was off by."""

    tolerance: float
    found: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, found: Any, wanted: Any) -> None:
        """Keep the largest error of numbers or tensors; relative where they are large."""
        a, b = torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
        error = ((a - b).abs() / b.abs().clamp(min=1)).max().item() if a.shape == b.shape else float("inf")
        self.found[name] = max(self.found.get(name, 0.0), error)

    def each(self, name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        """Tensors by name."""
        self.same(name, found.keys(), wanted.keys())
        for key, value in wanted.items():
            self.add(name, found.get(key, torch.zeros(())), value)

    def same(self, name: str, found: Any, wanted: Any) -> None:
        """For what can't be nearly right."""
        self.found[name] = max(self.found.get(name, 0.0), 0.0 if found == wanted else float("inf"))

    @property
    def passed(self) -> bool:
        """Whether there was anything to compare, and all of it is within the tolerance."""
        return bool(self.found) and all(e <= self.tolerance for e in self.found.values())


def replay(case: Path) -> Errors:
    """Run the recorded batches of `case` (a path without its ending) and compare."""
    facts = json.loads(case.with_name(case.name + ".json").read_text())
    tensors = load_file(case.with_name(case.name + ".safetensors"))
    name = facts["method"]
    errors = Errors(TOLERANCES.get(name, 1e-6))
    if name in REPAIRS:
        REPAIRS[name](facts, tensors, errors)
    elif name == "constrained_sft":
        _token_weights(facts, tensors, errors)
    else:
        _train(facts, tensors, errors)
    return errors


# Training


def _train(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    net = tiny_net(
        facts, tensors
    ).double()  # the recordings' rounding is error enough where differences count (Booster)
    method = _method(facts)
    groups = _groups(facts)
    steps = [_step(tensors, t, batches, method) for t, batches in enumerate(groups)]
    deltas = {name: Delta(delta.root.double()) for name, delta in _deltas(tensors).items()}
    passes = _MeanOfMeans(net, _fisher_batches(tensors), lambda: deltas)
    passes.accumulated = _accumulated(facts)
    if isinstance(method, RepNoise):
        method.noise = lambda step, layer, _: tensors[f"step{step:03d}.noise.layer{layer}"]  # type: ignore[method-assign]
    if isinstance(method, TVaccine):
        method.drawn = lambda step: torch.tensor(facts["steps"][step]["active_layers"])  # type: ignore[method-assign]
    recorder = _Recorder(method)
    _fit(LisaModule(passes, method, _Rates.of(facts, len(steps)), seed=facts["seed"], key={}), steps, recorder)

    final = {name: weight.detach() for name, weight in trainable(net).items()}
    for name, wanted in tensors.items():
        if name.startswith("final."):
            errors.add("weights", final[name.removeprefix("final.")], wanted)
    for step, batches, found, kept in zip(steps, groups, recorder.metrics, recorder.kept, strict=True):
        wanted = facts["steps"][batches[0]] | {"loss": sum(facts["steps"][i]["loss"] for i in batches)}
        _compare_step(wanted, found, kept, step, errors)
    if "drifts" in facts:
        drifts = {t: m["switch/drift"] for t, m in enumerate(recorder.metrics) if "switch/drift" in m}
        recorded = {d["before_step"]: d["drift"] for d in facts["drifts"]}
        errors.same("switches", drifts.keys(), recorded.keys())
        for t, drift in recorded.items():
            errors.add("drift", drifts.get(t, float("inf")), drift)
    if "fisher" in method.kept:
        off = torch.cat(
            [(f - tensors[f"fisher.{n}"]).flatten() for n, f in zip(passes.names, method.kept["fisher"], strict=True)]
        )
        errors.add("fisher", off.norm() / torch.cat([f.flatten() for f in method.kept["fisher"]]).norm(), 0.0)
    if isinstance(method, AsFT):
        _regulariser(facts, tensors, method, passes.names, errors)


def tiny_net(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The case's Llama with its adapter, the LoRA factors as they were at the start."""
    sizes = dict(facts["model"])
    theta = sizes.pop("rope_theta", 10000.0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters={"rope_type": "default", "rope_theta": theta}))
    whole = "aligned." if "aligned.lm_head.weight" in tensors else "base."
    model.load_state_dict({k.removeprefix(whole): v for k, v in tensors.items() if k.startswith(whole)}, strict=True)
    lora = facts["lora"]
    targets = list(lora["targets"])
    net = attach(
        model, SimpleNamespace(r=lora["r"], alpha=lora["alpha"], dropout=lora.get("dropout", 0.0), targets=targets), 0
    )
    initial = {k.removeprefix("init."): v for k, v in tensors.items() if k.startswith("init.")}
    own = trainable(net)
    if own.keys() != initial.keys():
        raise ValueError(f"adapter weights differ: {sorted(own.keys() ^ initial.keys())[:4]}")
    with torch.no_grad():
        for name, value in initial.items():
            own[name].copy_(value)
    return net


ELSEWHERE = {
    "lamb": ("lamb", "lambda_reg"),
    "safe_rows": ("alignment_batch_size",),
    "rho": ("rho",),
    "seed": ("seed",),
}
"""Argument -> what a case may call it, where that is another name."""
OFFICIAL = {"carry_over": True, "official": True, "padding": True, "per_micro_batch": True, "add_back": True}
"""The switches that turn on what only the official code does."""


def _method(facts: dict[str, Any]) -> Method:
    """The method by the case's own name, through conf/ as a run finds it."""
    name = {"tvaccine": "t_vaccine"}.get(facts["method"], facts["method"])
    found = CONF / "method" / f"{name}.yaml"
    cfg: Any = OmegaConf.load(found) if found.exists() else OmegaConf.load(CONF / "align" / f"{name}.yaml").method
    given = {}
    for key in cfg:
        for called in ELSEWHERE.get(key, (key,)):
            if called in facts:
                given[key] = facts[called]
    if name == "booster":
        given["rho"] = 0.0  # the case's rho belongs to the trainer's other methods
    return instantiate(cfg, **given, **{k: v for k, v in OFFICIAL.items() if k in cfg})


@dataclass(frozen=True)
class _Rates(Optim):
    """A case's optimizer; AsFT's rate falls by gamma after each epoch."""

    gamma: float
    epoch: int

    @classmethod
    def of(cls, facts: dict[str, Any], steps: int) -> "_Rates":
        """From the case's JSON."""
        return cls(
            lr=facts["lr"],
            steps=steps,
            batch_size=facts["batch_size"],
            accumulate=1,
            clip=facts["max_grad_norm"],
            schedule=facts.get("lr_scheduler", "constant"),
            warmup_ratio=facts.get("lr_warmup_ratio", 0.0),
            weight_decay=facts["weight_decay"],
            betas=tuple(facts["betas"]),
            eps=facts["eps"],
            gamma=facts.get("gamma", 1.0),
            epoch=-(-facts.get("steps_per_epoch", steps) // _accumulated(facts)),
        )

    def lr_at(self, step: int) -> float:
        """Of a 0-based step."""
        return super().lr_at(step) * self.gamma ** (step // self.epoch)


def _accumulated(facts: dict[str, Any]) -> int:
    return facts.get("gradient_accumulation", 1)


def _groups(facts: dict[str, Any]) -> list[list[int]]:
    """The recorded batches of each optimizer step: an epoch's last step may have fewer."""
    count = facts.get("total_steps") or len(facts["steps"])
    epoch, size = facts.get("steps_per_epoch", count), _accumulated(facts)
    starts = [start + i for start in range(0, count, epoch) for i in range(0, min(epoch, count - start), size)]
    ends = [min(start + size, (start // epoch + 1) * epoch, count) for start in starts]
    return [list(range(start, end)) for start, end in zip(starts, ends, strict=True)]


class _MeanOfMeans(Passes):
    """As trainers accumulate: each micro-batch's own mean, divided by the number that a full step has."""

    accumulated = 1

    def mean_loss(self, batch: Batch) -> Share:
        """Of a micro-batch."""

        def share(packs: Sequence[Pack]) -> Tensor:
            labels = sum(len(p.targets) for p in packs)
            return completion_loss(self.model, packs) / (labels * self.accumulated)

        return share


def _step(tensors: dict[str, Tensor], t: int, batches: list[int], method: Method) -> Step:
    streams = method.draws(t)
    return Step(t, {name: _batch(tensors, [f"step{i:03d}.{name}" for i in batches], name, method) for name in streams})


def _batch(tensors: dict[str, Tensor], prefixes: list[str], stream: Stream, method: Method) -> Batch:
    micro, tokens = [], 0
    for prefix in prefixes:
        ids, labels, mask = (tensors[f"{prefix}.{name}"] for name in ("input_ids", "labels", "attention_mask"))
        tokens += int((labels[:, 1:] != IGNORED).sum())
        if method.rows_apart:  # padding as it was recorded
            micro.append([padded(ids, mask.bool(), labels)])
        else:
            micro.append(pack(examples(ids, labels, mask.bool())))
    return Batch(stream, micro, tokens)


def examples(ids: Tensor, labels: Tensor, mask: Tensor) -> list[Example]:
    """Rows without their padding."""
    return [
        Example(tuple(i[m].tolist()), tuple(label[m].tolist())) for i, label, m in zip(ids, labels, mask, strict=True)
    ]


def _fisher_batches(tensors: dict[str, Tensor]) -> Callable[[Stream, int], Iterator[Batch]]:
    prefixes = sorted({k.rpartition(".")[0] for k in tensors if k.startswith("fisher") and k.endswith(".input_ids")})
    names = ("input_ids", "labels", "attention_mask")

    def whole(stream: Stream, size: int) -> Iterator[Batch]:
        for prefix in prefixes:
            ids, labels, mask = (tensors[f"{prefix}.{name}"] for name in names)
            yield Batch(stream, [pack(examples(ids, labels, mask.bool()))], int((labels[:, 1:] != IGNORED).sum()))

    return whole


class _Recorder(Callback):
    """Keeps every step's metrics, and what the method kept."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.metrics: list[dict[str, float]] = []
        self.kept: list[dict[str, list[Tensor]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """After every optimizer step."""
        assert isinstance(pl_module, LisaModule)
        self.metrics.append(pl_module.metrics)
        self.kept.append(dict(self.method.kept))


def _compare_step(
    wanted: dict[str, Any], found: dict[str, float], kept: dict[str, list[Tensor]], step: Step, errors: Errors
) -> None:
    """One recorded batch."""
    penalty = sum(value for name, value in found.items() if name.endswith("/penalty"))
    errors.add("loss", found["train/loss"] + penalty, wanted["loss"])
    if "state" in wanted:
        errors.same("states", step.main.stream, wanted["state"])
    if "gradient_norm" in wanted:
        errors.add(
            "norms",
            [found[f"t_vaccine/norm_{i}"] for i in range(len(wanted["gradient_norm"]))],
            wanted["gradient_norm"],
        )
        errors.add("probabilities", kept["probability"][0], wanted["probability"])
    if "active_layers" in wanted:
        errors.same("layers", kept["active"][0].tolist(), wanted["active_layers"])
    if "penalty_per_layer" in wanted:
        kept_terms = [p for p, k in zip(wanted["penalty_per_layer"], wanted["kept"], strict=True) if k]
        errors.add("penalty", found["ldifs/penalty"], sum(kept_terms))
        errors.same("layers", found["ldifs/layers_kept"], float(len(kept_terms)))
        errors.add("norms", found["ldifs/gradient_norm"], wanted["grad_norm_before_inner_clip"])
    if "mmd_per_layer" in wanted:
        hidden = wanted["ce_harmful_hidden"]
        errors.add("mmd", found["repnoise/mmd"], sum(wanted["mmd_per_layer"]) / len(wanted["mmd_per_layer"]))
        errors.add("entropy", found["harmful/loss"], (wanted["ce_harmful_final"] + sum(hidden)) / len(hidden))
        errors.add("harmless", found["train/loss"], wanted["ce_harmless"])


def _fit(module: LisaModule, steps: list[Step], recorder: _Recorder) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[recorder],
        )
        trainer.fit(module, train_dataloaders=DataLoader(steps, batch_size=None))  # type: ignore[arg-type]


# What a case records beside a training run


def _regulariser(
    facts: dict[str, Any], tensors: dict[str, Tensor], method: AsFT, names: list[str], errors: Errors
) -> None:
    """AsFT's penalty and its gradient at the initial weights."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b, delta in method.pairs:
        right, left = (tensors[f"init.{names[i]}"].double().requires_grad_() for i in (a, b))
        term = facts["lambda_reg"] * distance(right, left, delta)
        for i, gradient in zip((a, b), torch.autograd.grad(term, (right, left)), strict=True):
            errors.add("penalty's gradient", gradient, tensors[f"reg_grad.{names[i]}"])
        total += term.detach()
    errors.add("penalty", total, facts["reg_value_at_init"])


def _token_weights(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Constrained SFT on recorded logits: weights, loss, gradient by the logits."""
    cfg: Any = OmegaConf.load(CONF / "method" / "constrained_sft.yaml")
    called = {"first_factor": "first_token_bias_factor"}
    method = instantiate(cfg, **{k: facts[called.get(k, k)] for k in map(str, cfg) if called.get(k, k) in facts})
    counted = tensors["labels"][:, 1:] != IGNORED
    targets, places = tensors["labels"][:, 1:][counted], (counted.cumsum(1) - 1)[counted]
    logits = tensors["policy_logits"].clone().requires_grad_()
    policy, reference = (
        torch.nn.functional.log_softmax(x[:, :-1][counted], -1).gather(1, targets[:, None])[:, 0]
        for x in (logits, tensors["reference_logits"])
    )
    weights = method.weights(policy.detach(), reference, places)
    loss = -(weights * policy).sum() / len(targets)
    (gradient,) = torch.autograd.grad(loss, logits)
    errors.add("log-probabilities", policy.detach(), tensors["policy_logps"][:, 1:][counted])
    errors.add("weights", weights, tensors["weights"][:, 1:][counted])
    errors.add("loss", loss.detach(), facts["loss"])
    errors.add("gradient", gradient, tensors["grad_policy_logits"])


def _deltas(tensors: dict[str, Tensor]) -> dict[str, Delta]:
    """V of every adapted matrix, from both models' weights; nothing where the case has one model."""
    if not any(k.startswith("aligned.") for k in tensors):
        return {}
    before, after = (
        {k.removeprefix(f"{which}."): v for k, v in tensors.items() if k.startswith(f"{which}.")}
        for which in ("base", "aligned")
    )
    names = {k.partition(".lora_")[0].removeprefix(f"init.{PREFIX}") for k in tensors if k.startswith("init.")}
    return dense_deltas(after, before, names)


# Repairs


def _safe_lora(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    init, deltas = under("init.", tensors), _deltas(tensors)
    named = {b: module for module, (_, b) in modules(init).items()}
    prefixes: dict[Literal["threshold", "number"], str] = {"threshold": "final.", "number": "final_number."}
    for mode, prefix in prefixes.items():
        wanted = facts["results"][mode]
        repair = SafeLora(mode, facts["num_proj_layers"], facts["threshold"])
        found = repair.repair(_given(init, deltas=lambda: deltas))
        cosines = {named[b]: c for b, c in wanted["cosines"].items()}
        errors.same("cosines", {m: round(c, 5) for m, c in found.cosines.items()}, cosines)
        errors.same("projected", sorted(found.projected), sorted(named[b] for b in wanted["projected"]))
        errors.each("weights", found.factors, under(prefix, tensors))


def _antidote(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    net, rows = tiny_net(facts, tensors), _rows(tensors, "harmful")
    repair = Antidote(facts["dense_ratio"], pads_count=facts["padded"])
    found = repair.repair(_given(under("init.", tensors), net=lambda: net, rows=lambda stream: rows))
    errors.each("scores", found.scores, under("score.", tensors))
    for name, mask in under("mask.", tensors).items():
        errors.same("masks", found.masks[name].tolist(), mask.bool().tolist())
    errors.each("weights", found.factors, under("final.", tensors))


def _nlsr(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    net, rows, reference = tiny_net(facts, tensors), _rows(tensors, "safety"), under("reference.", tensors)
    settings = (facts[k] for k in ("sparsity_ratio", "prune_rate", "epsilon", "draw_seed"))
    given = _given(under("init.", tensors), net=lambda: net, rows=lambda stream: rows, reference=lambda: reference)
    found = Nlsr(*settings, most_similar_first=True).repair(given)
    errors.each("low rank", found.low_rank, under("lowrank.", tensors))
    for name, mask in under("mask.", tensors).items():
        errors.same("masks", found.masks[f"{name}.weight"].tolist(), mask.bool().tolist())
    for what, values in (("similarity", found.similarity), ("probability", found.probability)):
        errors.add(what, [values[name.removeprefix(PREFIX)] for name in facts["modules"]], facts[what])
    errors.same("replaced", sorted(found.replaced), sorted(name.removeprefix(PREFIX) for name in facts["replaced"]))
    errors.each("weights", found.factors, under("final.", tensors))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors behind a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _given(factors: Factors, **rest: Callable[..., Any]) -> Given:
    def never() -> Any:
        raise AssertionError("not needed")

    return Given(factors, **{**dict.fromkeys(("net", "rows", "deltas", "reference"), never), **rest})


def _rows(tensors: dict[str, Tensor], stream: str) -> list[Pack]:
    names = sorted(name.removesuffix(".input_ids") for name in tensors if name.endswith(f".{stream}.input_ids"))
    found = []
    for name in names:
        ids, labels = tensors[f"{name}.input_ids"], tensors[f"{name}.labels"]
        mask = tensors.get(f"{name}.attention_mask", torch.ones_like(ids)).bool()
        found.append(padded(ids, mask, labels))
    return found


REPAIRS = {"safelora": _safe_lora, "antidote": _antidote, "nlsr": _nlsr}


def main(cases: list[str]) -> int:
    """Replay and print; 1 where any case fails."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft's call
    failed = not cases
    for case in cases:
        errors = replay(Path(case))
        failed |= not errors.passed
        said = "  ".join(f"{name} {error:.1e}" for name, error in errors.found.items())
        print(f"{Path(case).name}  {said}" + ("" if errors.passed else f"  FAILED (tolerance {errors.tolerance:.0e})"))
    if not cases:
        print(__doc__, file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
