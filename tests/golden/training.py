"""Replay of a golden case's training run by this project's own code, and of the values recorded beside it."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from golden.case import Rates, accumulated, deltas_of, groups_of, method_of, step_of, tiny_net, whole_streams
from golden.errors import Errors
from helpers.recording import Recording
from lisa_lightning.align import repnoise
from lisa_lightning.align.repnoise import RepNoise
from lisa_lightning.align.t_vaccine import TVaccine
from lisa_lightning.data.dpp import DPP
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import IGNORED, Pack, pack_padded
from lisa_lightning.method.asft import AsFT, distance
from lisa_lightning.method.base import Method
from lisa_lightning.method.constrained_sft import ConstrainedSFT
from lisa_lightning.method.kl import KL
from lisa_lightning.method.ldifs import LDIFS
from lisa_lightning.method.salora import SaLoRA
from lisa_lightning.method.sbr import SBR
from lisa_lightning.method.spag import SPAG
from lisa_lightning.model.alignment_delta import Delta
from lisa_lightning.model.factors import modules, trainable
from lisa_lightning.objective.backprop import Backprop, IterStream, LossFn, State
from lisa_lightning.objective.loss import completion_loss, token_losses
from lisa_lightning.trainer.module import LisaModule


def train(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Train as the recorded run did, and compare the two runs."""
    net = tiny_net(
        facts, tensors
    ).double()  # the recordings' rounding is error enough where differences count (Booster)
    method = method_of(facts)
    groups = groups_of(facts)
    steps = [step_of(tensors, t, len(groups), batches, method) for t, batches in enumerate(groups)]
    deltas = {name: Delta(delta.root.double()) for name, delta in deltas_of(tensors).items()}
    # SBR's trainer divides by the tokens of the whole step, as this project does.
    mean = Backprop if "items_in_batch" in facts["steps"][0] else _MeanOfMeans
    backprop = mean(net, whole_streams(tensors), lambda: deltas)
    if isinstance(backprop, _MeanOfMeans):
        backprop.accumulated = accumulated(facts)
    recorder = _Recorder(method)
    module = _ReplayedModule(net, method, Rates.of_case(facts, len(steps)), seed=facts["seed"])
    module.replayed = backprop
    with _recorded_draws(facts, tensors), _recorded_start(tensors, errors), recorder.listening():
        _fit(module, steps, recorder)

    final = {name: weight.detach() for name, weight in trainable(net).items()}
    for name, wanted in tensors.items():
        if name.startswith("final."):
            errors.add("weights", final[name.removeprefix("final.")], wanted)
    for t, (step, batches, found) in enumerate(zip(steps, groups, recorder.metrics, strict=True)):
        wanted = facts["steps"][batches[0]] | {"loss": sum(facts["steps"][i]["loss"] for i in batches)}
        _compare_step(wanted, found, recorder.states[t], step, errors)
        _compare_penalty(wanted, found, method, len(batches), errors)
        _compare_layers(wanted, recorder.layers[t], method, errors)
        _compare_scales(wanted, recorder.layers[t], backprop.names, errors)
        for name, weight in recorder.before[t].items():
            if (recorded := tensors.get(f"before{batches[0]:03d}.{name}")) is not None:
                errors.add("weights", weight, recorded)
    if "drifts" in facts:
        drifts = {t: m["switch/drift"] for t, m in enumerate(recorder.metrics) if "switch/drift" in m}
        recorded = {d["before_step"]: d["drift"] for d in facts["drifts"]}
        ended = [steps[d["before_step"] - 1].main.stream for d in facts["drifts"]]
        errors.same("states", ended, [d["ended"] for d in facts["drifts"]])
        errors.same("switches", drifts.keys(), recorded.keys())
        for t, drift in recorded.items():
            errors.add("drift", drifts.get(t, float("inf")), drift)
    if fisher := module.state.get("fisher"):
        off = torch.cat([(f - tensors[f"fisher.{n}"]).flatten() for n, f in zip(backprop.names, fisher, strict=True)])
        errors.add("fisher", off.norm() / torch.cat([f.flatten() for f in fisher]).norm(), 0.0)
    if "frozen" in facts:
        optimizer: Any = module.optimizers()
        idle = [n for n, w in zip(backprop.names, backprop.weights, strict=True) if w not in optimizer.optimizer.state]
        errors.same("frozen", idle, facts["frozen"])
    if isinstance(method, AsFT):
        _regulariser(facts, tensors, backprop, errors)


@contextmanager
def _recorded_draws(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[None]:
    """Replace random draws by the recorded ones."""

    def noise(_: RepNoise, step: int, layer: int, shape: Sequence[int]) -> Tensor:
        return tensors[f"step{step:03d}.noise.layer{layer}"]

    def draw(_: TVaccine, probability: Tensor, step: int) -> Tensor:
        return torch.tensor(facts["steps"][step]["active_layers"])

    with patch.object(RepNoise, "noise", noise), patch.object(TVaccine, "draw", draw):
        yield


@contextmanager
def _recorded_start(tensors: dict[str, Tensor], errors: Errors) -> Iterator[None]:
    """Compare the start of SaLoRA, and replace its factors by the recorded ones.

    Singular vectors have free signs, and those of near singular values mix by rounding, unlike products B A.
    """
    start = SaLoRA.start

    def recorded(method: SaLoRA, backprop: Backprop, state: State) -> State:
        state = start(method, backprop, state)
        names, init = backprop.names, [tensors[f"init.{name}"].double() for name in backprop.names]
        computed, official = (dict(zip(names, values, strict=True)) for values in (state["anchor"], init))
        update: State = {"anchor": init, "start_a": [], "start_b": []}
        for i, (layer, (a, b)) in enumerate(modules(names).items()):
            v, a0, b0 = (state[name][i] for name in ("projection", "start_a", "start_b"))
            errors.add("projection", torch.eye(len(v)) - v @ v.T, tensors[f"C.{layer}"])
            errors.add("start", computed[b] @ computed[a], official[b] @ official[a])
            errors.add("residual", tensors[f"base.{layer}.weight"] - b0 @ a0, tensors[f"residual.{layer}.weight"])
            update["start_a"].append(official[a])
            update["start_b"].append(official[b] - v @ (v.T @ official[b]))
        backprop.set_weights(init)
        return start(method, backprop, state | update)

    with patch.object(SaLoRA, "start", recorded):
        yield


class _ReplayedModule(LisaModule):
    """Module that trains with the gradients of the recorded batches."""

    replayed: Backprop

    def make_backprop(self, iter_stream: IterStream) -> Backprop:
        return self.replayed


class _MeanOfMeans(Backprop):
    """Passes that accumulate like trainers: the mean of each micro-batch, divided by the number in a full step."""

    accumulated = 1

    def mean_loss(self, batch: Batch) -> LossFn:
        """Return the loss function of a micro-batch."""

        def share(packs: Sequence[Pack], _: int) -> Tensor:
            labels = sum(len(p.targets) for p in packs)
            return completion_loss(self.model, packs) / (labels * self.accumulated)

        return share


class _Recorder(Callback):
    """Callback that keeps the weights, the metrics and the method's state of every step.

    The values of single layers, of which the method reports only the sum, are kept too.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.before: list[dict[str, Tensor]] = []
        self.metrics: list[dict[str, float]] = []
        self.recording = Recording()
        self.states: list[State] = []
        self.layers: list[dict[str, list[Tensor]]] = []
        self.heard: dict[str, list[Tensor]] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Record the results of the functions that compute a layer's numbers, within the context."""

        def listened(name: str, called: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(*told: Any) -> Tensor:
                found = called(*told)
                labels = len(told[1].targets) if name == "_cross_entropy" else 1
                self.heard.setdefault(name, []).append(found.detach() / labels)
                return found

            return call

        with ExitStack() as stack:
            where: dict[str, Any] = {"mmd": repnoise, "_cross_entropy": repnoise}
            if isinstance(self.method, LDIFS):
                where["_step_terms"] = LDIFS
            if isinstance(self.method, SPAG):
                where["scales"] = SPAG
            for name, owner in where.items():
                stack.enter_context(patch.object(owner, name, listened(name, getattr(owner, name))))
            yield

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Keep the weights before every optimizer step."""
        assert isinstance(pl_module, LisaModule)
        self.before.append({name: weight.detach().clone() for name, weight in trainable(pl_module.net).items()})

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        """Keep the metrics, the state and the values of layers after every optimizer step."""
        assert isinstance(pl_module, LisaModule)
        self.metrics.append(self.recording.steps[-1])
        self.states.append(dict(pl_module.state))
        self.layers.append(self.heard)
        self.heard = {}


def _compare_step(
    wanted: dict[str, Any], found: dict[str, float], kept: dict[str, list[Tensor]], step: Step, errors: Errors
) -> None:
    """Compare a step with one recorded batch."""
    penalty = sum(value for name, value in found.items() if name.endswith("/penalty"))
    errors.add("loss", found["train/loss"] + penalty, wanted["loss"])
    if "state" in wanted:
        errors.same("states", step.main.stream, wanted["state"])
    if "switched" in wanted:
        errors.same("switches", "switch/drift" in found, wanted["switched"])
    if "lr" in wanted:
        errors.add("rates", found["train/lr"], wanted["lr"])
    if "stepped" in wanted:
        errors.same("steps taken", bool(found.get("spag/triggered", True)), wanted["stepped"])
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
    if "ldifs/layers_kept" in found:  # not with a factor of 0
        errors.same("layers kept", found["ldifs/layers_kept"], float(sum(wanted["kept"])))
        errors.add("norms", found["ldifs/gradient_norm"], wanted["grad_norm_before_inner_clip"])
    if "mmd_per_layer" in wanted:
        hidden = wanted["ce_harmful_hidden"]
        errors.add("mmd", found["repnoise/mmd"], sum(wanted["mmd_per_layer"]) / len(wanted["mmd_per_layer"]))
        errors.add("entropy", found["repnoise/entropy"], (wanted["ce_harmful_final"] + sum(hidden)) / len(hidden))
        errors.add("harmless", found["train/loss"], wanted["ce_harmless"])


def _compare_penalty(
    wanted: dict[str, Any], found: dict[str, float], method: Method, micro_batches: int, errors: Errors
) -> None:
    """Compare the term of KL or SBR with that of one recorded batch, which has no factor."""
    if isinstance(method, KL):
        errors.add("penalty", found["kl/penalty"], method.beta * wanted["kl"])
    if isinstance(method, SBR):
        errors.add("penalty", found["sbr/penalty"], method.lamb * micro_batches * wanted["anchor_loss"])


def _compare_layers(wanted: dict[str, Any], heard: dict[str, list[Tensor]], method: Method, errors: Errors) -> None:
    """Compare the values of each layer with those of one recorded batch."""
    if isinstance(method, LDIFS) and method.rho > 0 and method.drop_threshold is not None:
        (terms,) = heard["_step_terms"]
        errors.add("layer penalties", terms, wanted["penalty_per_layer"])
        errors.same("layers", (terms < method.drop_threshold).tolist(), wanted["kept"])
    if "mmd_per_layer" in wanted:
        errors.add("layer mmd", torch.stack(heard["mmd"]), wanted["mmd_per_layer"])
        entropies = [*wanted["ce_harmful_hidden"], wanted["ce_harmful_final"]]
        harmful = heard["_cross_entropy"][1 : 1 + len(entropies)]  # behind the harmless rows'
        errors.add("layer entropies", torch.stack(harmful), entropies)


def _compare_scales(
    wanted: dict[str, Any], heard: dict[str, list[Tensor]], names: Sequence[str], errors: Errors
) -> None:
    """Compare the factors of each tensor's gradient with those of one recorded batch."""
    if "stepped" in wanted:
        scales = dict(zip(names, heard["scales"][0], strict=True)) if "scales" in heard else {}
        errors.each("scales", scales, {n: torch.tensor(scale) for n, scale in wanted.get("scales", {}).items()})


def _fit(module: LisaModule, steps: list[Step], recorder: _Recorder) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=recorder.recording,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[recorder],
        )
        trainer.fit(module, train_dataloaders=DataLoader(steps, batch_size=None))  # type: ignore[arg-type]


# What a case records beside a training run


def _regulariser(facts: dict[str, Any], tensors: dict[str, Tensor], backprop: Backprop, errors: Errors) -> None:
    """Compare AsFT's penalty and its gradient at the initial weights."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, pair in modules(backprop.names).items():
        a, b = (tensors[f"init.{name}"].double().requires_grad_() for name in pair)
        term = facts["lambda_reg"] * distance(a, b, backprop.deltas.get(layer))
        for name, gradient in zip(pair, torch.autograd.grad(term, (a, b)), strict=True):
            errors.add("penalty's gradient", gradient, tensors[f"reg_grad.{name}"])
        total += term.detach()
    errors.add("penalty", total, facts["reg_value_at_init"])


def token_weights(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Compare constrained SFT of a model whose weights are its logits.

    The weights are recorded logits, and are held to other recorded ones.
    """
    method = method_of(facts)
    assert isinstance(method, ConstrainedSFT)
    labels = tensors["labels"]
    pack = pack_padded(torch.zeros_like(labels), torch.ones_like(labels, dtype=torch.bool), labels)
    backprop = Backprop(_Logits(tensors["policy_logits"].clone()), lambda *_: iter(()))
    anchor = [tensors["reference_logits"]]
    policy = -token_losses(backprop.model, [pack]).detach()
    with backprop.swapped_weights(anchor):
        reference = -token_losses(backprop.model, [pack]).detach()
    batch = Batch("user", [[pack]], len(pack.targets))
    output = method.gradient(backprop, Step(0, 1, {"user": batch}), {"anchor": anchor})
    counted = labels[:, 1:] != IGNORED
    for found, name in ((policy, "policy_logps"), (reference, "reference_logps")):
        errors.add("log-probabilities", found, tensors[name][:, 1:][counted])
    errors.add("weights", method.weights(policy, reference, pack.label_index), tensors["weights"][:, 1:][counted])
    errors.add("loss", output.metrics["constrained_sft/loss"], facts["loss"])
    errors.add("gradient", output.gradients[0], tensors["grad_policy_logits"])


def selection(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Compare the selection of rows by SPARD's DPP, and the log-determinant of the selection's kernel."""
    dpp = DPP(facts["safe_sample_ratio"], facts["power"])
    selected = dpp.select(tensors["safe_embeddings"], tensors["reference_embeddings"])
    errors.same("selected", selected, facts["selected"])
    rows, references = (F.normalize(tensors[f"{name}_embeddings"].double(), dim=1) for name in ("safe", "reference"))
    features = (rows @ references.T).amax(1, keepdim=True) ** facts["power"] * rows
    kernel = features @ features.T + facts["epsilon"] * torch.eye(len(rows), dtype=torch.float64)
    error = abs(kernel[selected][:, selected].logdet().item() - facts["log_determinant_4_decimals"])
    errors.add("log determinant", max(0.0, error - 5e-5), 0.0)  # recorded with four decimals


class _Logits(torch.nn.Module):
    """Model, and the net that holds it, whose only weight is the logits that it returns."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def get_base_model(self) -> "_Logits":
        return self

    def forward(self, logits_to_keep: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits[:, logits_to_keep])
