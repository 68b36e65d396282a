"""Replays a golden case's training run through this project's own, and what was recorded beside it."""

import logging
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf
from replay_case import CONF, Rates, accumulated, deltas_of, fisher_batches, groups_of, method_of, step_of, tiny_net
from replay_errors import Errors
from torch import Tensor
from torch.utils.data import DataLoader

from lisa_lightning.align.repnoise import RepNoise
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.alignment_delta import Delta
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import IGNORED, Pack
from lisa_lightning.loss import completion_loss
from lisa_lightning.method.asft import AsFT, distance
from lisa_lightning.method.method import Method
from lisa_lightning.module import LisaModule
from lisa_lightning.net import trainable
from lisa_lightning.passes import Passes, Share


def train(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Train as the recorded run did, and compare."""
    net = tiny_net(
        facts, tensors
    ).double()  # the recordings' rounding is error enough where differences count (Booster)
    method = method_of(facts)
    groups = groups_of(facts)
    steps = [step_of(tensors, t, batches, method) for t, batches in enumerate(groups)]
    deltas = {name: Delta(delta.root.double()) for name, delta in deltas_of(tensors).items()}
    passes = _MeanOfMeans(net, fisher_batches(tensors), lambda: deltas)
    passes.accumulated = accumulated(facts)
    if isinstance(method, RepNoise):
        method.noise = lambda step, layer, _: tensors[f"step{step:03d}.noise.layer{layer}"]  # type: ignore[method-assign]
    if isinstance(method, TVaccine):
        method.drawn = lambda step: torch.tensor(facts["steps"][step]["active_layers"])  # type: ignore[method-assign]
    recorder = _Recorder(method)
    _fit(LisaModule(passes, method, Rates.of_case(facts, len(steps)), seed=facts["seed"], key={}), steps, recorder)

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


class _MeanOfMeans(Passes):
    """As trainers accumulate: each micro-batch's own mean, divided by the number that a full step has."""

    accumulated = 1

    def mean_loss(self, batch: Batch) -> Share:
        """Of a micro-batch."""

        def share(packs: Sequence[Pack]) -> Tensor:
            labels = sum(len(p.targets) for p in packs)
            return completion_loss(self.model, packs) / (labels * self.accumulated)

        return share


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
        errors.add("entropy", found["defender/loss"], (wanted["ce_harmful_final"] + sum(hidden)) / len(hidden))
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


def token_weights(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
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
