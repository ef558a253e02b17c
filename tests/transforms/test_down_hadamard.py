"""T_d: the merged weight undoes the online transform, in blocks too."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import UserError
from fptquant.transforms import DownHadamard
from fptquant.transforms.base import generator


@pytest.mark.parametrize(("size", "block_size"), [(36, None), (60, 12), (24, 8), (108, None)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-13)])
def test_the_product_is_unchanged(size: int, block_size: int | None, dtype: torch.dtype, bound: float) -> None:
    rng, transform = generator(0), DownHadamard(size, block_size)
    x, weight = torch.randn(5, size, generator=rng, dtype=dtype), torch.randn(7, size, generator=rng, dtype=dtype)
    difference = transform(x) @ transform.merge_into(weight, "down").T - x @ weight.T
    assert float(difference.abs().max()) < bound * size**0.5
    assert float((transform.inverse(transform(x)) - x).abs().max()) < bound
    assert transform.describe()["blocks"] == size // (block_size or size)


def test_impossible_sizes_are_refused_before_any_work() -> None:
    with pytest.raises(UserError, match="22"):
        DownHadamard(22)
    with pytest.raises(UserError, match="block_size = 5 does not divide the intermediate size 24"):
        DownHadamard(24, 5)
    with pytest.raises(UserError, match="T_d of 24 channels"):
        DownHadamard(24).merge_into(torch.zeros(2, 12), "down")
