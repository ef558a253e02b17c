"""T_o: the merged weight undoes the online transform, for any number of heads; with T_v every channel meets every other."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import UserError
from fptquant.ops import hadamard_matrix
from fptquant.transforms import OutHadamard
from fptquant.transforms.base import generator


@pytest.mark.parametrize(("heads", "head_dim", "block"), [(4, 8, 4), (9, 64, 36), (3, 8, 12), (32, 16, 32), (1, 8, 1), (5, 4, 20)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_the_product_is_unchanged(heads: int, head_dim: int, block: int, dtype: torch.dtype, bound: float) -> None:
    rng, transform, size = generator(0), OutHadamard(heads, head_dim), heads * head_dim
    x, weight = torch.randn(5, size, generator=rng, dtype=dtype), torch.randn(7, size, generator=rng, dtype=dtype)
    difference = transform(x) @ transform.merge_into(weight, "out").T - x @ weight.T
    assert float(difference.abs().max()) < bound * size**0.5
    assert float((transform.inverse(transform(x)) - x).abs().max()) < bound
    assert transform.describe()["block_size"] == block


def test_each_channel_is_mixed_with_those_of_the_other_heads() -> None:
    x = torch.randn(3, 4 * 6, generator=generator(1), dtype=torch.float64)
    expected = torch.einsum("ij,tjd->tid", hadamard_matrix(4) / 2, x.unflatten(-1, (4, 6))).flatten(-2)
    torch.testing.assert_close(OutHadamard(4, 6)(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [4, 9])
def test_with_a_hadamard_matrix_within_each_head_a_channel_is_spread_over_all(heads: int) -> None:
    """As QuaRot's; where channels are taken together, over most."""
    within = torch.block_diag(*[hadamard_matrix(16) / 4] * heads)
    spread = OutHadamard(heads, 16)(within.T)  # row c: what becomes of channel c
    torch.testing.assert_close(spread @ spread.T, torch.eye(heads * 16, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    reached = (spread.abs() > 1e-9).sum(1)
    assert int(reached.min()) >= (heads * 16 if heads == 4 else heads * 8)


def test_what_cannot_be_is_refused_before_any_work() -> None:
    with pytest.raises(UserError, match=r"no Hadamard matrix for 11 heads, nor with channels taken together \(sizes 11\)"):
        OutHadamard(11, 1)
    with pytest.raises(UserError, match="T_o of 4 heads of 8 does not fit"):
        OutHadamard(4, 8).merge_into(torch.zeros(2, 16), "out")
    with pytest.raises(UserError, match="has no side 'down'"):
        OutHadamard(4, 8).merge_into(torch.zeros(2, 32), "down")
