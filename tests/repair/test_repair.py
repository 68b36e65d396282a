"""Laws of repairs. test_golden.py compares repairs with their official implementations."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from golden.case import dense_deltas
from lisa_lightning.data.packing import Example, Pack, pad
from lisa_lightning.method.asft import distance
from lisa_lightning.model.alignment_delta import Delta, low_rank_deltas, matching_deltas
from lisa_lightning.model.factors import Factors, modules, stack, trainable
from lisa_lightning.model.lora import save_adapter
from lisa_lightning.repair.antidote import Antidote
from lisa_lightning.repair.base import RepairInputs
from lisa_lightning.repair.nlsr import NLSR
from lisa_lightning.repair.safe_lora import Projected, SafeLoRA
from lisa_lightning.repair.safe_merge import Merged, SafeMerge
from lisa_lightning.repair.task_arithmetic import TaskArithmetic
from lisa_lightning.runtime.errors import UserError


def never() -> Any:
    raise AssertionError("not needed")


def given(factors: Factors, **rest: Callable[..., Any]) -> RepairInputs:
    return RepairInputs(
        factors, **{**dict.fromkeys(("net", "rows", "deltas", "alignment", "reference"), never), **rest}
    )


def assert_equal(found: Factors, wanted: Factors, atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0)


def tiny_net(seed: int = 0, layers: Sequence[int] = (0, 1)) -> Any:
    """Return a net with r = 6 on q, k and v of these layers.

    Keys and values are narrower than queries, and every factor is random.
    """
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=max(layers) + 1, num_attention_heads=4, num_key_value_heads=2)
    targets = ["q_proj", "k_proj", "v_proj"]
    lora = LoraConfig(r=6, lora_alpha=3, target_modules=targets, layers_to_transform=[*layers], task_type="CAUSAL_LM")
    net = get_peft_model(LlamaForCausalLM(config), lora)
    for w in trainable(net).values():
        torch.nn.init.normal_(w)
    return net.eval()


def factors_of(net: Any) -> Factors:
    return {name: w.detach().clone() for name, w in trainable(net).items()}


def some_rows() -> list[Example]:
    ids = [(1, 2, 3, 4, 5, 6, 7, 8, 9), (4, 9, 2), (11, 3, 5, 8, 13, 4, 17)]
    return [Example(i, (-100, *i[1:])) for i in ids]


@pytest.mark.parametrize(("rows", "inner", "columns"), [(7, 3, 5), (4, 6, 9), (9, 5, 3)])
@pytest.mark.parametrize("deficient", [False, True])
def test_low_rank_delta_equals_the_dense_c(rows: int, inner: int, columns: int, deficient: bool) -> None:
    torch.manual_seed(rows)
    left, right, x = torch.randn(rows, inner), torch.randn(inner, columns), torch.randn(rows, 2)
    if deficient:  # two directions that nearly cancel
        left[:, 1], right[1] = left[:, 0], -right[0] * 1.001
    v = left.double() @ right.double()
    delta = Delta.low_rank(left, right)
    torch.testing.assert_close(delta.norm.double(), v.norm(), atol=0, rtol=1e-5)
    wanted = (v @ v.T / v.norm()) @ x.double()
    torch.testing.assert_close(delta.project(x).double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Delta(v.float()).project(x).double(), wanted, atol=1e-5, rtol=1e-5)


def test_deltas_of_an_adapters_folder_are_what_merging_adds(tmp_path: Path) -> None:
    net = tiny_net()
    base = {name: w.clone() for name, w in tiny_net().unload().state_dict().items()}
    net.base_model.model.config.save_pretrained(tmp_path)  # peft looks for the base model there
    save_adapter(net, str(tmp_path), tmp_path)
    names = list(modules(factors_of(net)))
    low, dense = low_rank_deltas(tmp_path), dense_deltas(net.merge_and_unload().state_dict(), base, names)
    assert low.keys() == dense.keys() == set(names)
    for name in names:
        x = torch.randn(low[name].root.shape[0], 3)
        torch.testing.assert_close(low[name].project(x), dense[name].project(x), atol=1e-4, rtol=1e-4)
    untouched = "model.layers.0.self_attn.o_proj"
    for deltas in (low, dense):
        assert matching_deltas(deltas, [untouched, names[0]]) == {names[0]: deltas[names[0]]}
        with pytest.raises(
            UserError, match=r"none of the modules that are fine-tuned \(o_proj\); it changed k_proj, q"
        ):
            matching_deltas(deltas, [untouched])


def differing(before: Factors, after: Factors) -> dict[str, int]:
    """Return the number of entries that differ, by factor, without factors that are equal."""
    counts = {name: int((after[name] != before[name]).sum()) for name in before}
    return {name: n for name, n in counts.items() if n}


def random_deltas(factors: Factors) -> dict[str, Delta]:
    return {m: Delta.low_rank(torch.randn_like(factors[b]), factors[a]) for m, (a, b) in modules(factors).items()}


def test_safe_lora_equals_the_dense_equation() -> None:
    factors = factors_of(tiny_net())
    deltas = random_deltas(factors)
    found = SafeLoRA("threshold", 0, 1.0).repair(given(factors, deltas=lambda: deltas))
    for module, (a, b) in modules(factors).items():
        c = deltas[module].root @ deltas[module].root.T / deltas[module].norm
        update = factors[b] @ factors[a]
        wanted = torch.cosine_similarity((c @ update).flatten(), update.flatten(), dim=0)
        assert found.cosines[module] == pytest.approx(wanted.item(), abs=1e-6)
        torch.testing.assert_close(found.factors[b], c @ factors[b], atol=1e-5, rtol=1e-5)


def test_asft_equals_the_dense_equation_and_its_gradient() -> None:
    factors = factors_of(tiny_net())
    deltas = random_deltas(factors)
    for module, (a, b) in modules(factors).items():
        right, left = (w.detach().double().requires_grad_() for w in (factors[a], factors[b]))
        delta = Delta(deltas[module].root.double())
        c = delta.root @ delta.root.T / delta.norm
        own, wanted = distance(right, left, delta), (left @ right - c @ left @ right).square().sum()
        torch.testing.assert_close(own, wanted)
        torch.testing.assert_close(*(torch.autograd.grad(term, (right, left)) for term in (own, wanted)))
        with torch.autocast("cpu", torch.bfloat16):  # as training in bf16-mixed
            own = distance(factors[a], factors[b], deltas[module])
        torch.testing.assert_close(own, wanted.float(), atol=0, rtol=1e-5)


def test_modules_that_aligning_left_alone_have_a_c_of_zero_for_asft_and_none_for_safe_lora() -> None:
    factors = factors_of(tiny_net())
    deltas = random_deltas(factors)
    untouched, (a, b) = next(iter(modules(factors).items()))
    del deltas[untouched]
    found = SafeLoRA("threshold", 0, 1.0).repair(given(factors, deltas=lambda: deltas))
    assert untouched not in found.cosines
    assert differing(factors, found.factors) == {b: factors[b].numel() for _, b in list(modules(factors).values())[1:]}
    update = factors[b] @ factors[a]
    torch.testing.assert_close(distance(factors[a], factors[b], None), update.square().sum())
    with pytest.raises(
        UserError, match=r"aligning changed none of the modules .*k_proj, q_proj, v_proj.*changed nothing"
    ):
        SafeLoRA("threshold", 0, 1.0).repair(given(factors, deltas=dict))


def test_safe_lora_projects_as_many_modules_as_it_is_told() -> None:
    factors = factors_of(tiny_net())
    deltas = random_deltas(factors)

    def projected(*args: Any, **kwargs: Any) -> Projected:
        return SafeLoRA(*args, **kwargs).repair(given(factors, deltas=lambda: deltas))

    assert not differing(factors, projected("threshold", 0, -1.0).factors)
    assert not differing(factors, projected("number", 0, 1.0).factors)
    for number in (2, 6):
        found = projected("number", number, -1.0)
        assert len(differing(factors, found.factors)) == number
        assert set(found.projected) == set(sorted(found.cosines, key=found.cosines.__getitem__)[:number])
    controls = [differing(factors, projected("number", 2, 0.0, random=True, seed=s).factors) for s in (*range(9), 0)]
    assert {len(c) for c in controls} == {2}
    assert controls[0] == controls[-1]
    assert len({tuple(c) for c in controls}) > 1
    with pytest.raises(UserError, match="changed only 6 of the adapter"):
        projected("number", 7, 0.0)
    factors = {name: w * (".lora_A." in name) for name, w in factors.items()}  # all cosines are 0
    assert [len(projected("number", 1, 0.0, rounded=r).projected) for r in (False, True)] == [1, 6]


@pytest.mark.parametrize("pads_count", [False, True])
def test_antidote_equals_its_definition(pads_count: bool) -> None:
    net, (packed,) = tiny_net(), pad(some_rows())
    factors, seen = factors_of(net), {}
    for name in factors:
        linear = net.get_submodule(name.removesuffix(".weight"))
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].detach()}))
    net(packed.ids) if pads_count else net(packed.ids, packed.mask.long())
    counted = torch.ones_like(packed.mask) if pads_count else packed.mask
    repair = Antidote(0.1, pads_count=pads_count)
    wanted = {n: w.abs() * (seen[n][counted].square().sum(0) / len(packed.ids)).sqrt() for n, w in factors.items()}
    assert_equal(repair.repair(given(factors, net=lambda: net, rows=lambda stream: [packed])).scores, wanted, 1e-4)


def test_antidote_removes_as_much_of_every_row_at_random() -> None:
    net = tiny_net()
    factors = factors_of(net)

    def pruned(ratio: float, rows: list[Pack], **kwargs: Any) -> Factors:
        return Antidote(ratio, **kwargs).repair(given(factors, net=lambda: net, rows=lambda stream: rows)).factors

    together = pad(some_rows())
    assert not differing(factors, pruned(0.0, together))
    assert all(not w.any() for w in pruned(1.0, together).values())
    removed = {name: w == 0 for name, w in pruned(0.3, together).items()}
    for name, mask in removed.items():
        assert set(mask.sum(1).tolist()) == {5 if ".lora_A." in name else 2}  # of 16 and of 6 columns
    control = pruned(0.3, [], random=True, seed=1)
    assert all(torch.equal((w == 0).sum(1), removed[name].sum(1)) for name, w in control.items())
    assert_equal(control, pruned(0.3, [], random=True, seed=1), 0)
    assert differing(control, pruned(0.3, [], random=True, seed=2))
    with pytest.raises(UserError, match="needs defender rows"):
        pruned(0.3, [])


def realigned(net: Any, factors: Factors, reference: Factors, rows: list[Pack], **kwargs: Any) -> Any:
    supply = given(factors, net=lambda: net, rows=lambda stream: rows, reference=lambda: reference)
    return NLSR(**{"sparsity_ratio": 0.8, "prune_rate": 0.5, "epsilon": 0.2, "seed": 2, **kwargs}).repair(supply)


def test_nlsr_equals_its_definition() -> None:
    """NLSR equals its definition, which takes layers in order.

    The inputs of all factors of a layer are recorded before any of the factors is overwritten.
    """
    adapted = (0, 1, 3, 4)
    net, factors, reference = tiny_net(2, adapted), factors_of(tiny_net(0, adapted)), factors_of(tiny_net(1, adapted))
    found = realigned(net, factors, reference, pad(some_rows()))
    naive = tiny_net(2, adapted)
    weights = trainable(naive)
    with torch.no_grad():
        for name, w in weights.items():
            w.copy_(reference[name])
        for layer in (f"layers.{i}." for i in adapted):
            kept = {}
            for name in (n for n in weights if layer in n):
                linear, seen = naive.get_submodule(name.removesuffix(".weight")), []
                handle = linear.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[0, 1:]))
                for row in some_rows():
                    naive(input_ids=torch.tensor([row.ids]))
                handle.remove()
                v = torch.linalg.svd(torch.cat(seen).double()).Vh[:4].float().T
                kept[name] = v @ v.T @ reference[name]
            for name, w in kept.items():
                weights[name].copy_(w)
                torch.testing.assert_close(found.low_rank[name], w, atol=1e-4, rtol=1e-4)
    for module, (a, b) in modules(factors).items():
        updates = [(f[b] * found.masks[b]) @ (f[a] * found.masks[a]) for f in (factors, reference)]
        wanted = torch.cosine_similarity(*(u.flatten() for u in updates), dim=0)
        assert found.similarity[module] == pytest.approx(wanted.item(), abs=1e-5)


def test_nlsr_prefers_the_least_similar_and_its_control_replaces_as_much() -> None:
    net = tiny_net()
    factors, reference, rows = factors_of(net), factors_of(tiny_net(1)), pad(some_rows())
    found = realigned(net, factors, reference, rows)
    assert len(found.replaced) not in (0, 3, 6)  # else a control that picks the others would pass
    ranked = sorted(found.similarity, key=found.similarity.__getitem__)
    assert [found.probability[m] for m in ranked] == pytest.approx([0.7, 0.62, 0.54, 0.46, 0.38, 0.3])
    for name, count in differing(factors, found.factors).items():
        assert count == found.masks[name].sum() == factors[name].numel() - int(factors[name].numel() * 0.8) - 1
        assert torch.equal(found.factors[name][found.masks[name]], reference[name][found.masks[name]])
    assert len(differing(factors, found.factors)) == 2 * len(found.replaced)
    controls = [realigned(net, factors, reference, rows, random=True) for _ in range(2)]
    assert_equal(controls[0].factors, controls[1].factors, 0)
    assert len(controls[0].replaced) == len(found.replaced)
    for name, mask in controls[0].masks.items():
        assert mask.sum() == found.masks[name].sum()
        assert not torch.equal(mask, found.masks[name])
    another = realigned(net, factors, reference, rows, random=True, seed=9)
    assert all(not torch.equal(mask, controls[0].masks[name]) for name, mask in another.masks.items())
    assert not differing(factors, realigned(net, factors, reference, rows, prune_rate=0.0, epsilon=0.0).factors)
    with pytest.raises(UserError, match="only one has"):
        realigned(net, factors, {}, rows)
    with pytest.raises(UserError, match=r"sparsity_ratio=0\.16: keeps 0 of the 6 ranks.*=0\.1667 or"):
        NLSR(0.16, 0.5, 0.2, 0).check(net, {})


def other_adapter(factors: Factors, rank: int, seed: int = 5) -> Factors:
    """Return a random adapter of the same modules and another rank."""
    generator = torch.Generator().manual_seed(seed)
    other: Factors = {}
    for a, b in modules(factors).values():
        other[a] = torch.randn(rank, factors[a].shape[1], generator=generator)
        other[b] = torch.randn(len(factors[b]), rank, generator=generator)
    return other


def without(factors: Factors, module: str) -> Factors:
    return {name: w for name, w in factors.items() if name not in modules(factors)[module]}


def assert_update(factors: Factors, module: str, expected: Tensor) -> None:
    a, b = modules(factors)[module]
    torch.testing.assert_close(factors[b] @ factors[a], expected, atol=1e-5, rtol=1e-5)


def test_stacked_adapters_have_the_sum_of_both_updates() -> None:
    first = factors_of(tiny_net())
    second = other_adapter(first, rank=2)
    names = list(modules(first))
    both = stack(without(first, names[0]), without(second, names[1]))
    assert list(modules(both)) == [*names[1:], names[0]]
    for module, (a, b) in modules(both).items():
        updates = [f[b] @ f[a] for f, lacking in ((first, names[0]), (second, names[1])) if module != lacking]
        assert len(both[a]) == both[b].shape[1] == 8
        assert_update(both, module, torch.stack(updates).sum(0))


def test_task_arithmetic_adds_the_alignment_update_also_to_modules_that_are_not_tuned() -> None:
    factors = factors_of(tiny_net())
    alignment = other_adapter(factors, rank=2)
    untuned, unaligned, *_ = modules(factors)
    tuned, vector = without(factors, untuned), without(alignment, unaligned)
    repaired = TaskArithmetic(0.5).repair(given(tuned, alignment=lambda: vector)).factors
    assert modules(repaired).keys() == modules(factors).keys()
    for module, (a, b) in modules(factors).items():
        update = torch.zeros(len(factors[b]), factors[a].shape[1])
        update = update if module == untuned else update + factors[b] @ factors[a]
        assert_update(repaired, module, update if module == unaligned else update + 0.5 * alignment[b] @ alignment[a])
    assert TaskArithmetic(0.0).repair(given(tuned, alignment=lambda: vector)).factors is tuned


@pytest.mark.parametrize("thinned", ["finetuned", "alignment"])
def test_dare_drops_entries_of_b_and_rescales_the_others(thinned: Any) -> None:
    factors = factors_of(tiny_net())
    alignment = other_adapter(factors, rank=6)

    def added(**kwargs: Any) -> Factors:
        return (
            TaskArithmetic(1.0, thinned=thinned, **kwargs).repair(given(factors, alignment=lambda: alignment)).factors
        )

    whole, dropped = added(), added(drop_rate=0.25, seed=1)
    kept = 0
    for a, b in modules(factors).values():
        assert torch.equal(dropped[a], whole[a])
        columns = slice(0, 6) if thinned == "finetuned" else slice(6, 12)
        mask = dropped[b][:, columns] != 0
        expected = whole[b].clone()
        expected[:, columns] *= mask / 0.75
        torch.testing.assert_close(dropped[b], expected)
        kept += int(mask.sum())
    entries = sum(factors[b].numel() for _, b in modules(factors).values())
    assert kept / entries == pytest.approx(0.75, abs=0.06)  # three standard deviations of 576 entries
    assert_equal(added(drop_rate=0.25, seed=1), dropped, 0)
    assert differing(added(drop_rate=0.25, seed=2), dropped)


def test_the_control_of_task_arithmetic_adds_an_update_of_the_same_singular_values() -> None:
    factors = factors_of(tiny_net())
    alignment, none = other_adapter(factors, rank=2), {name: torch.zeros_like(w) for name, w in factors.items()}

    def added(**kwargs: Any) -> Factors:
        return TaskArithmetic(1.0, **kwargs).repair(given(none, alignment=lambda: alignment)).factors

    control, plain = added(random=True), added()
    for a, b in modules(factors).values():
        one, other = control[b] @ control[a], plain[b] @ plain[a]
        assert (one - other).abs().max() > 0.1
        torch.testing.assert_close(torch.linalg.svdvals(one), torch.linalg.svdvals(other), atol=1e-5, rtol=0)
    assert_equal(added(random=True), control, 0)
    assert differing(added(random=True, seed=1), control)


def test_safe_merge_equals_the_dense_equation_in_modules_below_the_threshold() -> None:
    factors, safe = factors_of(tiny_net()), factors_of(tiny_net(1))
    deltas = random_deltas(factors)
    unaligned = next(iter(modules(factors)))
    del deltas[unaligned]

    def merged(*args: Any, **kwargs: Any) -> Merged:
        return SafeMerge(*args, **kwargs).repair(given(factors, deltas=lambda: deltas, reference=lambda: safe))

    cosines = merged(1.0).cosines
    assert cosines == SafeLoRA("threshold", 0, 1.0).repair(given(factors, deltas=lambda: deltas)).cosines | {
        unaligned: 0.0
    }
    threshold = sorted(cosines.values())[3]  # which isn't below itself
    for merge in ("deltas", "factors"):
        repaired = merged(threshold, 0.7, 0.4, merge=merge)
        assert set(repaired.merged) == set(sorted(cosines, key=cosines.__getitem__)[:3])
        assert unaligned in repaired.merged
        for module, (a, b) in modules(factors).items():
            update, safe_update = factors[b] @ factors[a], safe[b] @ safe[a]
            cross = 0.28**0.5 * (factors[b] @ safe[a] + safe[b] @ factors[a]) if merge == "factors" else 0
            expected = 0.7 * update + 0.4 * safe_update + cross if module in repaired.merged else update
            assert_update(repaired.factors, module, expected)
            assert len(repaired.factors[a]) == (12 if merge == "deltas" else 6)
    raised = next(module for module, value in cosines.items() if value < round(value, 5) < 1)
    both = [merged(round(cosines[raised], 5), rounded=rounded).merged for rounded in (False, True)]
    assert [raised in modules_of_one for modules_of_one in both] == [True, False]
    assert SafeMerge(-1.0).repair(given(factors, deltas=lambda: deltas)).factors is factors
    controls = [merged(threshold, random=True, seed=seed).merged for seed in (*range(9), 0)]
    assert {len(control) for control in controls} == {3}
    assert controls[0] == controls[-1]
    assert len(set(controls)) > 1


def test_an_embeddings_adapter_keeps_its_rank() -> None:
    net: Any = tiny_net().unload()
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"))
    deltas = random_deltas(factors_of(net))
    for repair in (TaskArithmetic(), SafeMerge()):
        with pytest.raises(UserError, match=r"repair=.*: changes the rank.*Fix: remove embed_tokens from lora.targets"):
            repair.check(net, deltas)
        repair.check(tiny_net(), random_deltas(factors_of(tiny_net())))
    SafeMerge(merge="factors").check(net, deltas)
    with pytest.raises(UserError, match="aligning changed none of the modules"):
        SafeMerge(merge="factors").check(net, {})


def test_the_order_of_the_factors_does_not_matter() -> None:
    net = tiny_net()
    factors, rows = factors_of(net), pad(some_rows())
    random_adapter = other_adapter(factors, rank=2)
    backwards = dict(reversed(factors.items()))
    deltas = random_deltas(factors)
    for repair in (
        SafeLoRA("number", 2, 0.0, random=True),
        Antidote(0.3, random=True),
        NLSR(0.8, 0.5, 0.2, seed=2),
        NLSR(0.8, 0.5, 0.2, seed=2, random=True),
        TaskArithmetic(0.5, 0.3, random=True),
        SafeMerge(0.5),
        SafeMerge(0.5, random=True),
    ):
        rest = {"net": lambda: net, "rows": lambda stream: rows, "deltas": lambda: deltas}
        rest["alignment"] = lambda: random_adapter
        one = repair.repair(given(factors, **rest, reference=lambda: {n: w + 1 for n, w in factors.items()}))
        other = repair.repair(given(backwards, **rest, reference=lambda: {n: w + 1 for n, w in backwards.items()}))
        assert_equal(one.factors, other.factors, 0)


def test_padding_counts_for_nothing_and_the_net_stays_as_it_was() -> None:
    net = tiny_net().train()
    factors, before = factors_of(tiny_net(2)), {name: w.clone() for name, w in net.state_dict().items()}
    apart, together = [pad([row])[0] for row in some_rows()], pad(some_rows())

    def scores(rows: list[Pack], **kwargs: Any) -> Factors:
        return Antidote(0.1, **kwargs).repair(given(factors, net=lambda: net, rows=lambda stream: rows)).scores

    def low_rank(rows: list[Pack]) -> Factors:
        return realigned(net, factors, factors, rows).low_rank

    for name, expected in scores(apart).items():
        torch.testing.assert_close(scores(together)[name], expected, atol=1e-5, rtol=1e-4)
    assert max((scores(together, pads_count=True)[n] - s).abs().max() for n, s in scores(apart).items()) > 0.1
    assert_equal(low_rank(together), low_rank(apart), 1e-3)
    after = net.state_dict()
    assert all(torch.equal(after[name], w) for name, w in before.items())
    assert all(m.training and not m._forward_pre_hooks for m in net.modules())
