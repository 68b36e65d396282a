"""SafeGrad: properties of its projection that are certain, and a first step that equals SFT."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers.recording import Recording
from helpers.training import Train, largest_difference
from lisa_lightning.data.schedule import StreamBatch
from lisa_lightning.method.safegrad import SafeGrad, remove_conflict
from lisa_lightning.method.sft import SFT
from lisa_lightning.objective.backprop import norm

SHAPES = ((3, 4), (5,), (1, 1))


def _tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


@given(st.integers(0, 10**6), st.floats(-2, 2), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_a_projected_gradient_does_not_oppose_the_reference(
    seed: int, share: float, user_scale: float, scale: float
) -> None:
    """Without a conflict nothing changes. Afterwards the gradient is orthogonal, and lacks a multiple of the reference.

    All tensors are one vector: single tensors may still oppose their reference.
    """
    reference = [scale * r for r in _tensors(seed)]
    gradients = [user_scale * (g + share * r) for g, r in zip(_tensors(seed + 1), _tensors(seed), strict=True)]
    originals = [g.clone() for g in gradients]
    projected, conflicts = remove_conflict(gradients, reference)
    unit = norm(gradients) * norm(reference)
    assert conflicts == bool(_inner(originals, reference) < 0)
    assert all(torch.equal(g, o) for g, o in zip(gradients, originals, strict=True))
    if not conflicts:
        assert all(torch.equal(p, o) for p, o in zip(projected, originals, strict=True))
        return
    assert abs(_inner(projected, reference)) <= 1e-6 * unit
    removed = [p - g for p, g in zip(projected, gradients, strict=True)]
    parallel = _inner(removed, reference)
    assert parallel >= 0
    assert abs(parallel - norm(removed) * norm(reference)) <= 1e-5 * unit
    assert norm(projected) <= norm(gradients) * (1 + 1e-6)


def test_a_reference_of_zero_or_below_the_range_of_squares_changes_nothing() -> None:
    gradients = _tensors(0)
    for factor in (0.0, -1e-30):
        projected, conflicts = remove_conflict(gradients, [factor * g for g in gradients])
        assert not conflicts
        assert all(torch.equal(p, g) for p, g in zip(projected, gradients, strict=True))


def test_the_first_step_is_that_of_sft_bit_for_bit_with_dropout(train: Train) -> None:
    seen = Recording()
    split = {"batch_size": 2, "accumulate": 2, "steps": 1}
    first = train(SafeGrad(3.0, 2), 0.3, folder="first", loggers=[seen], **split)
    assert (seen.values("safegrad/kl"), seen.values("safegrad/conflict")) == ([0], [0])
    assert largest_difference(first, train(SFT(), 0.3, folder="sft", **split)) == 0


def test_a_step_sums_the_projected_gradient_and_the_alignment_gradient(train: Train) -> None:
    """After a few steps the user's rows lead further away, a conflict; from the mirrored weights they lead back.

    The gradient with lamb less that without it is lamb times the alignment gradient.
    """
    module = train(SafeGrad(1.0, 2), steps=2)
    backprop, step = module.backprop, module.trainer.datamodule.steps[0]  # type: ignore[attr-defined]
    weights = [w.detach().clone() for w in backprop.weights]
    mirrored = [2 * start - w for start, w in zip(module.state["anchor"], weights, strict=True)]
    for values, expected_conflict in ((weights, True), (mirrored, False)):
        backprop.set_weights(values)
        outputs = [SafeGrad(lamb, 2).gradient(backprop, step, module.state) for lamb in (0.0, 2.0)]
        without, whole = ([g for g in output.gradients if g is not None] for output in outputs)
        alignment = [(w - o) / 2 for w, o in zip(whole, without, strict=True)]
        expected, conflict = remove_conflict(backprop.gradient(step.main)[1], alignment)
        assert outputs[0].metrics["safegrad/kl"] > 0
        assert conflict == bool(outputs[0].metrics["safegrad/conflict"]) == expected_conflict
        for gradient, other in zip(without, expected, strict=True):
            torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-4)


def test_it_draws_as_many_alignment_rows_as_it_says() -> None:
    assert SafeGrad(1.0, 3).plan(7) == {"user": StreamBatch(7), "alignment": StreamBatch(7, 3)}
