"""Replay of golden cases of repairs and of LoX: this project's own code changes the recorded adapter."""

from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from golden.case import deltas_of, rows_of, tiny_net, under
from golden.errors import Errors
from lisa_lightning.align.lox import LoX
from lisa_lightning.model.factors import PREFIX, Factors, modules
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.base import RepairInputs
from lisa_lightning.repair.nlsr import NLSR
from lisa_lightning.repair.safe_lora import SafeLoRA
from lisa_lightning.repair.safe_merge import SafeMerge, merge_factors
from lisa_lightning.repair.task_arithmetic import TaskArithmetic


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


def _lox(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    base, aligned = under("base.", tensors), under("aligned.", tensors)
    adapter, scaling = under("adapter.", tensors), 1.0
    if adapter:
        scaling = facts["lora"]["alpha"] / facts["lora"]["r"]
    else:
        adapter = _full_rank({name: aligned[name] - base[name] for name, w in base.items() if w.dim() > 1})
    for k, prefix in ((facts["k"], "final."), (None, "final_full.")):
        updates = _updates(LoX(k, facts["coef"]).finish(adapter, {}))
        weights = {name: base[name] + scaling * update for name, update in updates.items()}
        errors.each("weights", weights, under(prefix, tensors))


def _safe_merge(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    init, deltas = under("init.", tensors), deltas_of(tensors)
    finetuned_scaling, safe_scaling = (facts[key]["alpha"] / facts[key]["r"] for key in ("lora", "lora_safe"))
    # The safe adapter with the other's alpha/r, of which its factors get equal shares.
    safe = {name: (safe_scaling / finetuned_scaling) ** 0.5 * w for name, w in under("safe.", tensors).items()}
    cosines = {name.removeprefix(PREFIX): value for name, value in facts["cosines"].items()}
    for what, prefix in (("linear", "final."), ("tie", "final_tie.")):
        recorded = facts["results"][what]
        repair = SafeMerge(recorded["threshold"], *recorded["weights"], merge="factors", rounded=True)
        repaired = repair.repair(_given(init, deltas=lambda: deltas, reference=lambda: safe))
        errors.same("cosines", {module: round(value, 5) for module, value in repaired.cosines.items()}, cosines)
        errors.same("merged", [PREFIX + module for module in repaired.merged], recorded["merged"])
        # The recorded adapters have alpha/r = 1.
        errors.each(
            "weights", {n: finetuned_scaling**0.5 * w for n, w in repaired.factors.items()}, under(prefix, tensors)
        )
    recorded = facts["results"]["dare_linear"]
    merged = [name.removeprefix(PREFIX) for name in recorded["merged"]]
    for prefix, kept_factor in (("final_dare.", 1.0), ("final_dare_rescaled.", 1 / recorded["density"])):
        finetuned, other = (
            {n: kept_factor * w * _mask(tensors, n, adapter) for n, w in factors.items()}
            for adapter, factors in (("finetuned", init), ("safe", safe))
        )
        factors = merge_factors(finetuned, other, merged, *recorded["weights"])
        errors.each("dare", {n: finetuned_scaling**0.5 * w for n, w in factors.items()}, under(prefix, tensors))


def _mask(tensors: dict[str, Tensor], name: str, adapter: str) -> Tensor:
    """Return the recorded mask of a factor of an adapter."""
    module, _, factor = name.removesuffix(".default.weight").rpartition(".")
    return tensors[f"mask.{module}.{adapter}.{factor}"]


def _task_arithmetic(facts: dict[str, Any], tensors: dict[str, Tensor], errors: Errors) -> None:
    base, aligned, finetuned = (under(f"{which}.", tensors) for which in ("base", "aligned", "finetuned"))
    tuned = _full_rank({name: finetuned[name] - w for name, w in aligned.items()})
    vector = _full_rank({name: w - base[name] for name, w in aligned.items()})
    cases = (
        ("final.", "", TaskArithmetic(facts["coef"])),
        ("final_dare.", "mask.", TaskArithmetic(facts["coef"], facts["drop_rate"], "alignment")),
        ("final_dare_sft.", "mask_sft.", TaskArithmetic(facts["coef"], facts["drop_rate_sft"], "finetuned")),
    )
    for prefix, masks, repair in cases:

        def draw(_: TaskArithmetic, name: str, b: Tensor, __: torch.Generator, masks: str = masks) -> Tensor:
            module = name.removeprefix(PREFIX).partition(".lora_B.")[0]
            return tensors[f"{masks}{module}.weight"].view_as(b)

        with patch.object(TaskArithmetic, "_draw", draw):
            repaired = repair.repair(_given(tuned, alignment=lambda: vector)).factors
        weights = {name: aligned[name] + update.view_as(aligned[name]) for name, update in _updates(repaired).items()}
        errors.each("dare" if masks else "weights", weights, under(prefix, tensors))


def _full_rank(updates: dict[str, Tensor]) -> Factors:
    """Return the adapter of full updates by the name of the weight: B is the update, A = 1. Vectors become columns."""
    factors: Factors = {}
    for name, update in updates.items():
        b = update if update.dim() > 1 else update[:, None]
        module = f"{PREFIX}{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.default.weight": torch.eye(b.shape[1]), f"{module}.lora_B.default.weight": b}
    return factors


def _updates(factors: Factors) -> dict[str, Tensor]:
    """Return B A by the name of the weight."""
    return {f"{module}.weight": factors[b] @ factors[a] for module, (a, b) in modules(factors).items()}


def _given(factors: Factors, **rest: Callable[..., Any]) -> RepairInputs:
    def never() -> Any:
        raise AssertionError("not needed")

    return RepairInputs(
        factors, **{**dict.fromkeys(("net", "rows", "deltas", "alignment", "reference"), never), **rest}
    )


REPAIRS = {
    "safelora": _safe_lora,
    "antidote": _antidote,
    "nlsr": _nlsr,
    "lox": _lox,
    "safemerge": _safe_merge,
    "task_arithmetic": _task_arithmetic,
}
