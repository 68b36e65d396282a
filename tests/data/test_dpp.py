"""Laws of the DPP selection: each greedy step against brute force, the kernel of its formula, and its memory."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lisa_lightning.data.dpp import BLOCK_ROWS, DPP, JITTER, greedy_map, largest_cosines


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_det(kernel: Tensor, rows: list[int]) -> float:
    return kernel[rows][:, rows].logdet().item()


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 6), st.sampled_from([0.01, 0.3, 1.0]))
def test_each_step_selects_the_row_of_the_largest_determinant(seed: int, n: int, d: int, unit: float) -> None:
    """Each step selects the best of all remaining rows, also after as many rows as the kernel has rank."""
    features = normal(seed, n, d) * unit
    kernel = features @ features.T + JITTER * torch.eye(n, dtype=torch.float64)
    selected = greedy_map(features, n)
    assert sorted(selected) == list(range(n))
    for k in range(n):
        gains = {i: log_det(kernel, [*selected[:k], i]) for i in range(n) if i not in selected[:k]}
        assert gains[selected[k]] >= max(gains.values()) - 1e-4
    assert all(greedy_map(features, k) == selected[:k] for k in range(1, n))


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(0, 5))
def test_the_kernel_is_that_of_the_formula(seed: int, n: int, power: int) -> None:
    candidates, references = normal(seed, n, 4), normal(seed + 1, 3, 4)
    cosine = torch.nn.functional.cosine_similarity
    quality = torch.stack([max(cosine(c, r, dim=0) for r in references) for c in candidates]) ** power
    kernel = torch.stack([cosine(candidates, c[None]) for c in candidates]) * quality[:, None] * quality
    kernel += JITTER * torch.eye(n, dtype=torch.float64)
    selected = DPP(n / 3, power).select(candidates.float(), references.float())
    gains = [log_det(kernel, [i]) for i in range(n)]
    assert gains[selected[0]] == pytest.approx(max(gains), abs=1e-4)
    if len(selected) > 1:
        pairs = [log_det(kernel, [selected[0], i]) for i in range(n) if i != selected[0]]
        assert log_det(kernel, selected[:2]) == pytest.approx(max(pairs), abs=1e-3)


def test_relevance_comes_first_and_copies_come_last() -> None:
    references = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    candidates = torch.tensor([[0.4, 0.0, 1.0], [1.0, 0.1, 0.0], [1.0, 0.1, 0.0], [0.0, 5.0, 0.1]])
    assert set(DPP(1.0, 4).select(candidates, references)) == {1, 3}
    assert DPP(2.0, 4).select(candidates, references)[-1] == 2
    # Without relevance the row that is nothing like the user's counts as much as the others.
    assert set(DPP(1.5, 0).select(candidates, references)) == {0, 1, 3}


def test_equal_rows_and_empty_embeddings_are_selected_in_their_order() -> None:
    same = torch.ones(5, 3)
    assert DPP(1.0, 4).select(same, same) == [0, 1, 2, 3, 4]
    assert DPP(1.0, 4).select(torch.zeros(3, 2), torch.ones(3, 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("ratio", "candidates", "references", "count"),
    [(0.25, 30, 43, 10), (0.03, 100, 99, 2), (0.03, 100, 5, 1), (2.0, 100, 500, 100)],
)
def test_the_count_is_truncated_and_between_one_and_all(
    ratio: float, candidates: int, references: int, count: int
) -> None:
    dpp = DPP(ratio, 4)
    assert dpp.count(candidates, references) == count
    selected = dpp.select(normal(0, candidates, 3), normal(1, references, 3))
    assert len(set(selected)) == count


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that is computed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def test_memory_is_linear_in_the_candidates() -> None:
    n, m, d, k = 10_000, 3000, 8, 90
    candidates, references = normal(0, n, d).float(), normal(1, m, d).float()
    with LargestTensor() as largest:
        assert len(set(DPP(k / m, 4).select(candidates, references))) == k
    assert largest.numel <= n * BLOCK_ROWS < n * m < n * n


def test_blocks_of_references_are_one() -> None:
    candidates, references = (
        torch.nn.functional.normalize(normal(i, size, 3), dim=1) for i, size in ((0, 4), (1, 2500))
    )
    whole = (candidates @ references.T).amax(1)
    torch.testing.assert_close(largest_cosines(candidates, references), whole, atol=1e-12, rtol=0)
