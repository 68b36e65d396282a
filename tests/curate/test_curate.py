"""Laws of the choice of alignment rows: the kept rows, and each selector against autograd on a tiny model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from lisa_lightning.config.settings import Lora
from lisa_lightning.curate._progress import Progress
from lisa_lightning.curate._row_losses import RowBackprop
from lisa_lightning.curate.base import Candidates, Selector
from lisa_lightning.curate.pharmacist import Pharmacist, directional_derivatives
from lisa_lightning.curate.random import Random
from lisa_lightning.curate.seal import SEAL, _descend
from lisa_lightning.data.interleave import Examples
from lisa_lightning.data.packing import IGNORED, Example, Packing, pack, pad
from lisa_lightning.model.factors import trainable
from lisa_lightning.model.lora import attach
from lisa_lightning.objective.backprop import Backprop
from lisa_lightning.objective.loss import row_losses
from lisa_lightning.objective.loss_scale import LossScale
from lisa_lightning.pipeline.stages.curate import no_autocast_cache
from lisa_lightning.runtime.errors import UserError

SETTINGS: dict[str, Any] = {
    "keep": 0.5,
    "epochs": 2,
    "batch_size": 4,
    "micro_batch": 4,
    "lr": 1e-2,
    "selector_lr": 5e-2,
    "adam": True,
    "activation": "softmax",
    "upper_weight": 0.9,
    "upper_decay": 0.1,
    "seed": 1,
}


PHARMACIST: dict[str, Any] = {
    "keep": 0.5,
    "validation_rows": 3,
    "warmup_steps": 2,
    "epochs": 2,
    "batch_size": 4,
    "attack_batch": 3,
    "micro_batch": 2,
    "inner_lr": 0.3,
    "attack_lr": 0.2,
    "seed": 1,
}


def row(prompt: int, answer: int, tokens: int = 2) -> Example:
    """Return a row of four tokens that many rows share, one token of its own, and an answer."""
    ids = (1, 2, 3, 4, prompt, *[answer] * tokens)
    return Example(ids, (*[IGNORED] * 5, *[answer] * tokens))


def settings(**changed: Any) -> dict[str, Any]:
    return SETTINGS | changed


def pharmacist(**changed: Any) -> Pharmacist:
    return Pharmacist(**(PHARMACIST | changed))


def examples(rows: Sequence[Example]) -> Examples:
    return Examples(rows, lambda r: r)


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).requires_grad_(False)
    return attach(model, Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)


def backprop() -> Backprop:
    return Backprop(net(), lambda *_: iter(()))


def given(alignment: Sequence[Example], harmful: Sequence[Example] = (), packing: Packing = pack) -> Candidates:
    return Candidates(examples(alignment), examples(harmful), lambda: (backprop(), packing))


MIXED = [row(5 + i, 16 + i % 3, 1 + i % 3) for i in range(10)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda keep: Random(keep, 1),
        lambda keep: SEAL(**settings(keep=keep)),
        lambda keep: pharmacist(keep=keep),
    ],
    ids=["random", "seal", "pharmacist"],
)
def test_keep_one_is_no_curation_and_a_share_is_of_that_size_and_nested(make: Any) -> None:
    def kept(keep: float) -> list[int]:
        curate: Selector = make(keep)
        scores = curate.scores(given(MIXED, MIXED[:3])).tolist()
        assert len(scores) == 10
        return curate.selected_rows(scores)

    assert kept(1.0) == list(range(10))
    some, more = kept(0.3), kept(0.7)
    assert (len(some), len(more)) == (3, 7)
    assert more == sorted(more)
    assert set(some) < set(more)
    assert kept(0.3) == some, "equal seeds, equal choices"
    assert kept(3) == some, "a number of rows"
    with pytest.raises(UserError, match=r"curate\.keep=0\.01: keeps none of the 10"):
        kept(0.01)
    with pytest.raises(UserError, match=r"curate\.keep=11: there are only 10 alignment rows"):
        kept(11)


def test_another_seed_draws_other_rows() -> None:
    rows = given([MIXED[0]] * 100)
    one, other = (Random(0.5, seed) for seed in (1, 2))
    assert one.selected_rows(one.scores(rows).tolist()) != other.selected_rows(other.scores(rows).tolist())


@pytest.mark.parametrize("packing", [pack, pad])
def test_row_losses_are_each_rows_own_mean(packing: Packing) -> None:
    """Each row's loss is its own mean.

    Rows come in the order of their ids, as the selector hands them over. Two of them are equal, and one is the start of
    another.
    """
    rows = sorted([*MIXED, MIXED[0], row(5, 16, 3), row(23, 9, 4)], key=lambda e: e.ids)
    model = net().get_base_model()
    wanted = [model(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.labels])).loss for e in rows]
    sums, labels = row_losses(model, packing(rows))
    torch.testing.assert_close(sums / labels, torch.stack(wanted), atol=1e-5, rtol=0)


def by_autograd(curate: SEAL, candidates: Sequence[Example], upper: Sequence[Example]) -> Tensor:
    """Return the row weights of the same training as one loss of everything, one row at a time.

    Every step sees all rows.
    """

    def weights(theta: Tensor) -> Tensor:
        return len(theta) * theta.softmax(0) if curate.activation == "softmax" else 2 / (1 + (-theta).exp())

    model = net()
    ours = list(trainable(model).values())
    theta = torch.full((len(candidates),), {"softmax": 0.1, "sigmoid": -1e-4}[curate.activation], requires_grad=True)
    selector = torch.optim.SGD([theta], lr=curate.selector_lr)
    if curate.adam:
        selector = torch.optim.Adam([theta], lr=curate.selector_lr, betas=(0.9, 0.95))
    both = [torch.optim.Adam(ours, lr=curate.lr, betas=(0.9, 0.95)), selector]

    def losses(rows: Sequence[Example]) -> Tensor:
        return torch.stack([model(input_ids=torch.tensor([e.ids]), labels=torch.tensor([e.labels])).loss for e in rows])

    for epoch in range(curate.epochs):
        c = curate.upper_weight - epoch * curate.upper_decay
        p, own, u = weights(theta), losses(candidates), losses(upper)
        loss = c * u.mean() + (1 - c) * (p.detach() * own).mean() + (p * own.detach()).mean()
        for optimizer in both:
            optimizer.zero_grad()
        loss.backward()
        for variables in (ours, [theta]):
            torch.nn.utils.clip_grad_norm_(variables, 1.0)
        for optimizer in both:
            optimizer.step()
    return weights(theta.detach())


def test_both_levels_clip_their_gradient_at_norm_one() -> None:
    variable = torch.zeros(2)
    _descend(torch.optim.SGD([variable], lr=1.0), [variable], [torch.tensor([3.0, 4.0])])
    torch.testing.assert_close(variable, torch.tensor([-0.6, -0.8]))


@pytest.mark.slow
@pytest.mark.parametrize(("activation", "adam", "rate"), [("softmax", True, 0.05), ("sigmoid", False, 1.0)])
def test_the_selector_is_autograds(activation: str, adam: bool, rate: float) -> None:
    curate = SEAL(**settings(epochs=4, batch_size=6, activation=activation, adam=adam, selector_lr=rate))
    candidates, upper = MIXED[:6], MIXED[4:]
    ours = backprop()
    before = [w.detach().clone() for w in ours.weights]
    weights = curate.fit_weights(RowBackprop(ours, pack, 4), examples(candidates), examples(upper))
    torch.testing.assert_close(weights, by_autograd(curate, candidates, upper), atol=2e-5, rtol=0)
    assert weights.std() > 1e-3
    assert all(torch.equal(w, b) for w, b in zip(ours.weights, before, strict=True))


@pytest.mark.slow
def test_any_split_and_either_packing_gives_the_same_scores() -> None:
    def scores(packing: Packing, micro_batch: int) -> Tensor:
        return SEAL(**settings(micro_batch=micro_batch)).scores(given(MIXED, packing=packing))

    whole = scores(pack, 4)
    for other in (scores(pack, 1), scores(pack, 3), scores(pad, 4)):
        torch.testing.assert_close(other, whole, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("adam", "batch"), [(False, 5), (True, 25)])
def test_rows_that_agree_with_most_go_up_in_seal(adam: bool, batch: int) -> None:
    """SEAL keeps the rows that agree with most. A quarter of the rows answers otherwise.

    The last row's answer was cut off and can't be judged, so it comes last.
    """
    odd = [i % 4 == 0 for i in range(24)]
    rows = [row(5 + i % 10, 20 if o else 21) for i, o in enumerate(odd)]
    cut = Example((1, 2, 3), (IGNORED,) * 3)
    with pytest.raises(UserError, match="has a label token"):
        SEAL(**SETTINGS).scores(given([cut] * 4))
    seal = SEAL(**settings(epochs=3, batch_size=batch, lr=2e-2, adam=adam, keep=0.72))
    scores = seal.scores(given([*rows, cut])).tolist()
    assert seal.selected_rows(scores) == [i for i, o in enumerate(odd) if not o]
    assert scores[-1] == 0 < min(scores[:-1])


def trained_backprop(model: Any) -> RowBackprop:
    """Return the backprop of a model whose adapter is not fresh, so that every factor has a gradient."""
    torch.manual_seed(3)
    for weight in trainable(model).values():
        weight.data += 0.3 * torch.randn_like(weight)
    return RowBackprop(Backprop(model, lambda *_: iter(())), pack, micro_batch=2)


def double_net() -> Any:
    """Return a tiny OPT in float64. Llama computes its norms in float32."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16}
    config = OPTConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, dropout=0.0, max_position_embeddings=32)
    model = OPTForCausalLM(config).requires_grad_(False)
    return attach(model, Lora(r=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj", "fc1"]), 0).double()


def row_loss(model: Any, example: Example, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Return the mean loss of one row, in the precision of the model."""
    kwargs = {"input_ids": torch.tensor([example.ids])}
    logits = torch.func.functional_call(model, weights or {}, (), kwargs).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(example.labels[1:]))


def row_gradients(model: Any, weights: Sequence[Tensor], rows: Sequence[Example]) -> list[tuple[Tensor, ...]]:
    return [torch.autograd.grad(row_loss(model, row), weights) for row in rows]


def test_pharmacists_update_is_autograds_gradient_of_its_objective() -> None:
    """The update equals that of autograd with the harmful gradient held fixed, times the published 1 - alpha."""
    row_backprop = trained_backprop(double_net())
    backprop, size = row_backprop.backprop, len(MIXED)
    curate, indices = pharmacist(), [7, 2, 5, 0]
    batch, held_out, harmful = [MIXED[i] for i in indices], [row(5, 18), row(9, 16, 3)], [row(6, 20), row(7, 21, 2)]
    logits = torch.linspace(-1, 1, size, dtype=torch.float64)
    before = [w.detach().clone() for w in backprop.weights]
    update = curate.logit_update(row_backprop, logits, indices, batch, held_out, harmful)
    assert all(torch.equal(w, b) for w, b in zip(backprop.weights, before, strict=True))

    model, weights = backprop.net, dict(zip(backprop.names, before, strict=True))

    def mean_loss(values: dict[str, Tensor], rows: Sequence[Example]) -> Tensor:
        return torch.stack([row_loss(model, row, values) for row in rows]).mean()

    gradients = row_gradients(model, backprop.weights, batch)
    w = logits.clone().requires_grad_()
    gamma = w.softmax(0)[indices]
    trained = {
        name: weight
        - curate.inner_lr * size / len(batch) * sum(g * row[k] for g, row in zip(gamma, gradients, strict=True))
        for k, (name, weight) in enumerate(weights.items())
    }
    fixed = {name: value.detach().requires_grad_() for name, value in trained.items()}
    attack = torch.autograd.grad(mean_loss(fixed, harmful), list(fixed.values()))
    attacked = {n: value - curate.attack_lr * g for (n, value), g in zip(trained.items(), attack, strict=True)}
    (expected,) = torch.autograd.grad(mean_loss(attacked, held_out), w)
    torch.testing.assert_close(
        update, -(1 - curate.attack_lr) * expected, atol=1e-6 * float(expected.abs().max()), rtol=1e-6
    )


def test_directional_derivatives_are_inner_products_with_each_rows_gradient() -> None:
    row_backprop = trained_backprop(net())
    direction = [torch.randn_like(w) for w in row_backprop.backprop.weights]
    gradients = row_gradients(row_backprop.backprop.net, row_backprop.backprop.weights, MIXED)
    products = [sum((d * g).sum() for d, g in zip(direction, row, strict=True)) for row in gradients]
    expected = torch.stack([torch.as_tensor(p) for p in products])
    computed = directional_derivatives(row_backprop, MIXED, direction)
    torch.testing.assert_close(computed, expected, atol=1e-2 * float(expected.abs().max()), rtol=0)
    with torch.autocast("cpu", torch.bfloat16), no_autocast_cache():
        assert torch.equal(directional_derivatives(row_backprop, MIXED, direction), computed)


@pytest.mark.slow
def test_rows_that_contradict_held_out_rows_go_down_in_pharmacist() -> None:
    """Half of the candidates answer as the harmful rows do. The others answer as the held-out rows."""
    harmful, held_out = [row(5 + i, 20) for i in range(8)], [row(5 + i, 21) for i in range(8)]
    rows = [row(5 + i % 10, 20 if i % 2 else 21) for i in range(20)]
    selector = pharmacist(epochs=3, batch_size=10, warmup_steps=20, warmup_lr=1e-2)
    row_backprop = RowBackprop(backprop(), pack, 4)
    selector.warm_up(row_backprop, examples(rows))
    logits = selector.fit_logits(row_backprop, examples(rows), examples(held_out), examples(harmful), torch.zeros(20))
    assert selector.selected_rows(logits.tolist()) == list(range(0, 20, 2))


@pytest.mark.slow
def test_held_out_rows_and_rows_without_label_come_last_in_pharmacist() -> None:
    cut = Example((1, 2, 3), (IGNORED,) * 3)
    scores = pharmacist().scores(given([*MIXED, cut], MIXED[:3]))
    assert (scores == 0).sum() == 4
    assert scores[-1] == 0
    assert scores.sum() == pytest.approx(7, abs=1e-4)


@pytest.mark.slow
def test_pharmacists_scores_are_the_same_for_any_split_and_packing() -> None:
    def scores(packing: Packing, micro_batch: int) -> Tensor:
        selector = pharmacist(micro_batch=micro_batch, selector_lr=100.0)
        return selector.scores(given(MIXED, MIXED[:3], packing))

    whole = scores(pack, 4)
    assert whole[whole > 0].std() > 1e-2
    for other in (scores(pack, 1), scores(pad, 3)):
        torch.testing.assert_close(other, whole, atol=2e-3, rtol=0)


@pytest.mark.slow
def test_a_selection_continues_where_it_was_interrupted(tmp_path: Path) -> None:
    """A repeated selection equals an uninterrupted one bit for bit. Other inputs and damaged files are not used."""
    selector = pharmacist(selector_lr=100.0)
    straight = selector.scores(given(MIXED, MIXED[:3]))

    def scores(progress: Progress, defender: Sequence[Example] = MIXED[:3]) -> Tensor:
        return selector.scores(replace(given(MIXED, defender), progress=progress))

    path = tmp_path / "curate.safetensors"
    with pytest.raises(InterruptedError):
        scores(_Interrupted(path, "one", 2))
    first_step, _ = Progress(path, "one", 2).load()
    assert first_step == 2
    interrupted = path.read_bytes()
    assert torch.equal(scores(Progress(path, "one", 2)), straight)
    path.write_bytes(interrupted)
    assert not torch.equal(scores(Progress(path, "one", 2), MIXED[3:6]), straight), "the saved steps count"
    path.write_bytes(interrupted)
    assert Progress(path, "other", 2).load() == (0, {})
    assert torch.equal(scores(Progress(path, "other", 2)), straight)
    path.write_bytes(interrupted[:-1] + bytes([interrupted[-1] ^ 1]))
    with pytest.raises(UserError, match=r"curate\.safetensors can't be used \(its content has changed\)\. Fix: delete"):
        Progress(path, "one", 2).load()


@pytest.mark.slow
def test_a_selection_continues_with_its_loss_scale(tmp_path: Path) -> None:
    def scale(progress: Progress) -> LossScale:
        loss_scale, rows = LossScale(2.0**4), examples(MIXED)
        made = Backprop(net(), lambda *_: iter(()), loss_scale=loss_scale)
        pharmacist().scores(Candidates(rows, examples(MIXED[:3]), lambda: (made, pack), progress))
        return loss_scale

    straight = scale(Progress(tmp_path / "straight.safetensors", "one", 2))
    path = tmp_path / "curate.safetensors"
    with pytest.raises(InterruptedError):
        scale(_Interrupted(path, "one", 2))
    assert straight.good_steps > 4
    assert scale(Progress(path, "one", 2)).state_dict() == straight.state_dict()


class _Interrupted(Progress):
    """Progress that interrupts the selection after its second save."""

    def save(self, step: int, tensors: dict[str, Tensor]) -> None:
        super().save(step, tensors)
        if step == 3:
            raise InterruptedError


def test_the_model_learns_in_bfloat16_too() -> None:
    with torch.autocast("cpu", torch.bfloat16), no_autocast_cache():
        learnt, still = (SEAL(**settings(lr=lr)).scores(given(MIXED, MIXED[:3])) for lr in (0.05, 1e-30))
        assert not torch.is_autocast_cache_enabled()
    assert (learnt - still).abs().max() > 1e-3
    assert torch.is_autocast_cache_enabled()


def test_what_is_missing_or_not_finite_is_said() -> None:
    with pytest.raises(UserError, match=r"needs defender rows, and source\.defender has none"):
        pharmacist().scores(given(MIXED))
    with pytest.raises(UserError, match=r"curate\.validation_rows=3: leaves no candidate of 3 .* Fix: .*=1 or less"):
        pharmacist().scores(given(MIXED[:3], MIXED))
    with pytest.raises(UserError, match=r"curate\.warmup_lr=1e\+30: a loss of step 1 is nan"):
        pharmacist(warmup_lr=1e30).scores(given(MIXED, MIXED))
    with pytest.raises(UserError, match="there is only 1"):
        SEAL(**settings(keep=1.0)).scores(given(MIXED[:1]))
    with pytest.raises(UserError, match=r"curate\.lr=1e\+30: a loss of step 1 is nan\. Fix: a smaller"):
        SEAL(**settings(lr=1e30)).scores(given(MIXED))


@pytest.mark.slow
def test_a_selector_in_float16_skips_steps_that_overflow() -> None:
    """A loss scale, as a power of two, changes no score in float32. Scores in float16 are close.

    Steps that overflow are skipped, and the scores stay finite.
    """

    def scores(loss_scale: LossScale | None) -> Tensor:
        made = Backprop(net(), lambda *_: iter(()), loss_scale=loss_scale)
        rows = examples(MIXED)
        return SEAL(**settings(epochs=9, adam=False)).scores(Candidates(rows, rows, lambda: (made, pack)))

    single = scores(None)
    assert torch.equal(single, scores(LossScale()))
    with torch.autocast("cpu", torch.float16), no_autocast_cache():
        torch.testing.assert_close(scores(LossScale(2.0**4)), single, atol=0.02, rtol=0)
        scale = LossScale(2.0**40)
        assert scores(scale).isfinite().all()
    assert scale.good_steps > 0
