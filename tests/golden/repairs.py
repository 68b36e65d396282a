"""Replay of golden cases of repairs: this project's own code repairs the recorded adapter."""

from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from golden.case import deltas_of, rows_of, tiny_net, under
from golden.errors import Errors
from lisa_lightning.model.factors import PREFIX, Factors, modules
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.base import RepairInputs
from lisa_lightning.repair.nlsr import NLSR
from lisa_lightning.repair.safe_lora import SafeLoRA


def _safe_lora(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    init, deltas = under("init.", tensors), deltas_of(tensors)
    named = {b: module for module, (_, b) in modules(init).items()}
    prefixes: dict[Literal["threshold", "number"], str] = {"threshold": "final.", "number": "final_number."}
    for mode, wanted in facts["results"].items():
        prefix = prefixes[mode]
        repair = SafeLoRA(mode, facts["num_proj_layers"], facts["threshold"], rounded=True)
        found = repair.repair(_given(init, deltas=lambda: deltas))
        cosines = {named[b]: c for b, c in wanted["cosines"].items()}
        errors.same("modules", found.cosines.keys(), cosines.keys())
        off = torch.tensor([abs(found.cosines[module] - cosine) for module, cosine in cosines.items()])
        errors.add("cosines", (off.max() - 5e-6).clamp(min=0), 0.0)  # recorded with five decimals
        errors.same("projected", sorted(found.projected), sorted(named[b] for b in wanted["projected"]))
        errors.each("weights", found.factors, under(prefix, tensors))


def _antidote(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    net, rows = tiny_net(facts, tensors), rows_of(tensors, "harmful")
    repair = Antidote(facts["dense_ratio"], pads_count=facts["padded"])
    found = repair.repair(_given(under("init.", tensors), net=lambda: net, rows=lambda stream: rows))
    errors.each("scores", found.scores, under("score.", tensors))
    for name, mask in under("mask.", tensors).items():
        errors.same("masks", found.masks[name].tolist(), mask.bool().tolist())
    errors.each("weights", found.factors, under("final.", tensors))


def _nlsr(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    net, rows, reference = tiny_net(facts, tensors), rows_of(tensors, "safety"), under("reference.", tensors)
    settings = (facts[k] for k in ("sparsity_ratio", "prune_rate", "epsilon", "draw_seed"))
    given = _given(under("init.", tensors), net=lambda: net, rows=lambda stream: rows, reference=lambda: reference)
    scores: dict[str, Tensor] = {}

    def heard(own: NLSR, reference: Factors, a: str, b: str, latent: Tensor) -> Factors:
        scores.update({a: latent, b: latent @ reference[b].T})
        return truncate(own, reference, a, b, latent)

    truncate = NLSR._truncate
    with patch.object(NLSR, "_truncate", heard):
        found = NLSR(*settings, most_similar_first=True).repair(given)
    for name, wanted in under("activation_score.", tensors).items():  # of sums that cancel: relative to the whole
        errors.add("scores", (scores[f"{name}.weight"] - wanted).norm() / wanted.norm(), 0.0)
    errors.each("low rank", found.low_rank, under("lowrank.", tensors))
    for name, mask in under("mask.", tensors).items():
        errors.same("masks", found.masks[f"{name}.weight"].tolist(), mask.bool().tolist())
    for what, values in (("similarity", found.similarity), ("probability", found.probability)):
        errors.add(what, [values[name.removeprefix(PREFIX)] for name in facts["modules"]], facts[what])
    drawn = [int(name.removeprefix(PREFIX) in found.replaced) for name in facts["modules"]]
    errors.same("drawn", drawn, facts["bernoulli"])
    errors.same("replaced", sorted(found.replaced), sorted(name.removeprefix(PREFIX) for name in facts["replaced"]))
    errors.each("weights", found.factors, under("final.", tensors))


def _given(factors: Factors, **rest: Callable[..., Any]) -> RepairInputs:
    def never() -> Any:
        raise AssertionError("not needed")

    return RepairInputs(factors, **{**dict.fromkeys(("net", "rows", "deltas", "reference"), never), **rest})


REPAIRS = {"safelora": _safe_lora, "antidote": _antidote, "nlsr": _nlsr}
