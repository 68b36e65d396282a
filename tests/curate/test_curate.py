"""Laws of the choice of alignment rows: the kept rows, and the bilevel selector against autograd on a tiny model."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lisa_lightning.config.settings import Lora
from lisa_lightning.curate._selector import _descend
from lisa_lightning.curate.base import Candidates, Selector
from lisa_lightning.curate.pharmacist import Pharmacist, unlikelihood
from lisa_lightning.curate.random import Random
from lisa_lightning.curate.seal import SEAL
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


def row(prompt: int, answer: int, tokens: int = 2) -> Example:
    """Return a row of four tokens that many rows share, one token of its own, and an answer."""
    ids = (1, 2, 3, 4, prompt, *[answer] * tokens)
    return Example(ids, (*[IGNORED] * 5, *[answer] * tokens))


def settings(**changed: Any) -> dict[str, Any]:
    return SETTINGS | changed


def examples(rows: Sequence[Example]) -> Examples:
    return Examples(rows, lambda r: r)


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).requires_grad_(False)
    return attach(model, Lora(r=4, alpha=8, dropout=0.0, targets="all-linear"), 0)


def backprop() -> Backprop:
    return Backprop(net(), lambda stream, size: iter(()))


def given(alignment: Sequence[Example], harmful: Sequence[Example] = (), packing: Packing = pack) -> Candidates:
    return Candidates(examples(alignment), examples(harmful), lambda: (backprop(), packing))


MIXED = [row(5 + i, 16 + i % 3, 1 + i % 3) for i in range(10)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda **k: Random(k["keep"], k["seed"]), SEAL, Pharmacist])
def test_keep_one_is_no_curation_and_a_share_is_of_that_size_and_nested(make: Any) -> None:
    def kept(**changed: Any) -> list[int]:
        curate: Selector = make(**settings(**changed))
        scores = curate.scores(given(MIXED, MIXED[:3])).tolist()
        assert len(scores) == 10
        return curate.selected_rows(scores)

    assert kept(keep=1.0) == list(range(10))
    some, more = kept(keep=0.3), kept(keep=0.7)
    assert (len(some), len(more)) == (3, 7)
    assert more == sorted(more)
    assert set(some) < set(more)
    assert kept(keep=0.3) == some, "equal seeds, equal choices"
    with pytest.raises(UserError, match=r"curate\.keep=0\.01: keeps none of the 10"):
        kept(keep=0.01)


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


def by_autograd(curate: SEAL | Pharmacist, candidates: Sequence[Example], upper: Sequence[Example]) -> Tensor:
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
        u = -(1 - (-u).exp()).log() if isinstance(curate, Pharmacist) else u
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
@pytest.mark.parametrize("kind", [SEAL, Pharmacist])
def test_the_selector_is_autograds(
    kind: type[SEAL] | type[Pharmacist], activation: str, adam: bool, rate: float
) -> None:
    curate = kind(**settings(epochs=4, batch_size=6, activation=activation, adam=adam, selector_lr=rate))
    candidates, upper = MIXED[:6], MIXED[4:]
    ours = backprop()
    before = [w.detach().clone() for w in ours.weights]
    loss = unlikelihood if isinstance(curate, Pharmacist) else lambda losses: losses
    weights = curate.fit_weights(ours, pack, examples(candidates), examples(upper), loss)
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


@pytest.mark.parametrize(("adam", "batch"), [(False, 5), (True, 20)])
def test_rows_that_contradict_harmful_answers_go_up_in_pharmacist(adam: bool, batch: int) -> None:
    """Pharmacist keeps the rows that contradict harmful answers. The other half answers as the harmful rows do."""
    harmful = [row(5 + i, 20) for i in range(8)]
    rows = [row(5 + i % 10, 20 if i % 2 else 21) for i in range(20)]
    pharmacist = Pharmacist(**settings(epochs=3, batch_size=batch, lr=2e-2, adam=adam))
    assert pharmacist.selected_rows(pharmacist.scores(given(rows, harmful)).tolist()) == list(range(0, 20, 2))


def test_the_model_learns_in_bfloat16_too() -> None:
    with torch.autocast("cpu", torch.bfloat16), no_autocast_cache():
        learnt, still = (SEAL(**settings(lr=lr)).scores(given(MIXED, MIXED[:3])) for lr in (0.05, 1e-30))
        assert not torch.is_autocast_cache_enabled()
    assert (learnt - still).abs().max() > 1e-3
    assert torch.is_autocast_cache_enabled()


def test_what_is_missing_or_not_finite_is_said() -> None:
    with pytest.raises(UserError, match=r"needs defender rows, and source\.defender has none"):
        Pharmacist(**SETTINGS).scores(given(MIXED))
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
        made = Backprop(net(), lambda stream, size: iter(()), loss_scale=loss_scale)
        rows = examples(MIXED)
        return SEAL(**settings(epochs=9, adam=False)).scores(Candidates(rows, rows, lambda: (made, pack)))

    single = scores(None)
    assert torch.equal(single, scores(LossScale()))
    with torch.autocast("cpu", torch.float16), no_autocast_cache():
        torch.testing.assert_close(scores(LossScale(2.0**4)), single, atol=0.02, rtol=0)
        scale = LossScale(2.0**40)
        assert scores(scale).isfinite().all()
    assert scale.good_steps > 0
