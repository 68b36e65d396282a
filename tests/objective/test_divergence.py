"""The KL divergence from the anchor: torch's value and gradient, and exact zeros where nothing has moved."""

import pytest
import torch
from torch.nn import functional as F

from lisa_lightning.objective.divergence import kl_divergence


@pytest.mark.parametrize("dim", [-1, 1])
def test_value_and_gradient_are_those_of_torch(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, logits = (scale * torch.randn(3, 7, 11, generator=generator) for scale in (3, 1))
    logits.requires_grad_()
    divergence = kl_divergence(reference, logits, dim)
    expected = F.kl_div(
        logits.double().log_softmax(dim), reference.double().log_softmax(dim), reduction="sum", log_target=True
    )
    assert divergence.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,), (other,) = (torch.autograd.grad(value, logits) for value in (divergence, expected))
    torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-5)
    assert kl_divergence(logits, reference, dim).item() != pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_logits_have_a_value_and_a_gradient_of_exactly_zero(dtype: torch.dtype) -> None:
    logits = (10 * torch.randn(50, 300, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    divergence = kl_divergence(logits.detach(), logits)
    assert divergence.item() == 0
    assert not torch.autograd.grad(divergence, logits)[0].any()
