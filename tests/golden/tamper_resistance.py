"""Replay of a golden case of TAR, whose adversaries train inside each outer step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from golden.case import batch_of, method_of, tiny_model, tiny_net
from golden.errors import Errors
from lisa_lightning.align.tar import TAR, Attack
from lisa_lightning.data.interleave import Batch, Step
from lisa_lightning.data.packing import Pack
from lisa_lightning.data.schedule import Stream
from lisa_lightning.model.factors import trainable
from lisa_lightning.objective.backprop import Backprop, LossFn
from lisa_lightning.objective.loss import completion_loss


def resist(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    """Train as the recorded run did, and compare every pass, every outer gradient and the weights."""
    is_lora = facts["trained"] == "lora"
    net = tiny_net(facts, tensors) if is_lora else AllWeights(tiny_model(facts, tensors))
    method = method_of(facts)
    assert isinstance(method, TAR)
    backprop = OfficialAccumulation(net, lambda *_: iter(()))
    # The recorded reference model is the base model.
    start = {name: w.detach() * (".lora_B." not in name) for name, w in trainable(net).items()}
    state = {"anchor": [value.clone() for value in start.values()]}
    weights = "weights" if is_lora else "all weights"
    optimizer: Any = torch.optim.AdamW if is_lora else ScheduleFreeAdamW
    warmup = {} if is_lora else {"warmup_steps": facts["warmup_steps"]}
    options = {"betas": facts["betas"], "eps": facts["eps"], "weight_decay": facts["weight_decay"]}
    outer = optimizer(backprop.weights, lr=facts["lr"], **options, **warmup)
    for t, fact in enumerate(facts["outer"]):
        attacks = [Attack(task["lr"], 0) for task in fact["tasks"]]
        backprop.losses.clear()
        with (
            patch.object(TAR, "draw", lambda *_, attacks=attacks: attacks),
            patch.object(TAR, "tamper_loss", mean_of_means(TAR.tamper_loss)),
            patch.object(TAR, "retain_loss", mean_of_means(TAR.retain_loss)),
        ):
            output = method.gradient(backprop, _step(facts, tensors, t, method), state)
        _compare(fact, output.metrics["tar/penalty"], backprop.losses, method, errors)
        gradients = zip(backprop.names, output.gradients, strict=True)
        _compare_tensors("outer gradient", f"outer_grad{t:03d}.", tensors, gradients, errors)
        _compare_tensors(weights, f"before_outer{t:03d}.", tensors, trainable(net).items(), errors)
        for weight, gradient in zip(backprop.weights, output.gradients, strict=True):
            weight.grad = gradient
        outer.step()
    _compare_tensors(weights, "final.", tensors, trainable(net).items(), errors)


class AllWeights(nn.Module):
    """Model whose weights all train, in place of a model with an adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        return self.model

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return self.model.named_parameters()


class OfficialAccumulation(Backprop):
    """Passes of the official loop: means of each micro-batch are averaged, and gradients are divided once more."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.losses: list[float] = []
        """Loss of each pass."""

    def mean_loss(self, batch: Batch) -> LossFn:
        """Return the loss function of a micro-batch."""
        count = len(batch.micro_batches)
        return lambda packs, _: completion_loss(self.model, packs) / (sum(len(p.targets) for p in packs) * count)

    def gradient(
        self, batch: Batch, loss_fn: LossFn | None = None, weights: Sequence[Tensor] | None = None
    ) -> tuple[float, list[Tensor]]:
        """Return a loss of a batch and its gradients."""
        loss, gradients = super().gradient(batch, loss_fn, weights)
        self.losses.append(loss)
        return loss, [gradient / len(batch.micro_batches) for gradient in gradients]


def mean_of_means(make_loss: Callable[..., LossFn]) -> Callable[..., LossFn]:
    """Return a loss maker that treats each micro-batch as a batch, and averages their losses."""

    def make(method: TAR, backprop: Backprop, batch: Batch, *more: Any) -> LossFn:
        parts = [make_loss(method, backprop, replace(batch, micro_batches=[m]), *more) for m in batch.micro_batches]

        def loss(packs: Sequence[Pack], index: int) -> Tensor:
            return parts[index](packs, 0) / len(parts)

        return loss

    return make


class ScheduleFreeAdamW:
    """The official outer optimizer in train mode, whose weights are the iterates y (schedulefree 1.2.7).

    Iterates z take AdamW's steps without momentum. The averages x of z weigh each step by its squared rate, which
    includes the correction of the second moment's bias.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float,
        warmup_steps: int,
    ) -> None:
        self.weights = weights
        self.lr, self.betas, self.eps, self.weight_decay, self.warmup_steps = lr, betas, eps, weight_decay, warmup_steps
        self.z = [weight.detach().clone() for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in weights]
        self.steps, self.max_lr, self.total = 0, 0.0, 0.0

    @torch.no_grad()
    def step(self) -> None:
        """Move y and z by the gradients of the weights."""
        self.steps += 1
        beta, square_beta = self.betas
        warmup = min(1.0, self.steps / max(1, self.warmup_steps))
        lr = self.lr * warmup * math.sqrt(1 - square_beta**self.steps)
        self.max_lr = max(self.max_lr, lr)
        self.total += self.max_lr**2
        share = self.max_lr**2 / self.total
        for y, z, square in zip(self.weights, self.z, self.squares, strict=True):
            assert y.grad is not None
            square.mul_(square_beta).addcmul_(y.grad, y.grad, value=1 - square_beta)
            update = y.grad / (square.sqrt() + self.eps) + self.weight_decay * y
            y.lerp_(z, share)
            y.add_(update, alpha=lr * (beta * (1 - share) - 1))
            z.sub_(update, alpha=lr)


def _step(facts: dict[str, Any], tensors: dict[str, Tensor], t: int, method: TAR) -> Step:
    """Return the recorded batches of an outer step. Those of adversaries are harmful rows, or benign ones too."""
    micro_batches = range(facts["gradient_accumulation"])

    def batch(part: str, name: str, stream: Stream) -> Batch:
        return batch_of(tensors, [f"outer{t:03d}{part}.{i}.{name}" for i in micro_batches], stream, method)

    batches: list[Batch] = []
    for task in range(method.attacks):
        batches.append(batch(f".task{task}", "meta", "defender"))
        batches += [batch(f".task{task}.inner{i}", "adversary", "defender") for i in range(method.inner_steps)]
    defender = replace(batches[0], further=batches[1:])
    return Step(t, len(facts["outer"]), {"alignment": batch("", "retain", "alignment"), "defender": defender})


def _compare(fact: dict[str, Any], penalty: float, losses: list[float], method: TAR, errors: Errors) -> None:
    """Compare the losses of an outer step, in the order of its passes, with the recorded ones."""
    passes = iter(losses)
    for task in fact["tasks"]:
        for inner, recorded in enumerate(task["inner"]):
            errors.add("adversary", next(passes), recorded["adversary_loss"])
            errors.same("measured", inner in method.factors, recorded["measured"])
            if recorded["measured"]:
                errors.add("factor", method.factors[inner], recorded["scale"])
                errors.add("entropy", next(passes) * method.factors[inner], recorded["tamper_resistance_loss"])
    errors.add("retain", method.retain_scale * next(passes), fact["retain_loss"])
    errors.add("penalty", penalty, fact["tamper_resistance_loss"])
    errors.same("added", method.lower_bound is None or penalty >= method.lower_bound, fact["added"])


def _compare_tensors(
    name: str,
    prefix: str,
    recorded: dict[str, Tensor],
    tensors: Iterable[tuple[str, Tensor | None]],
    errors: Errors,
) -> None:
    """Compare those tensors that are recorded with this prefix."""
    for key, tensor in tensors:
        if (expected := recorded.get(prefix + key)) is not None:
            errors.add(name, tensor, expected)
