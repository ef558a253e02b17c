"""S_n: a residual stream with scaled branches equals the plain one, epsilon included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.transforms import ResidualScaling
from fptquant.transforms.base import generator

EPS = 0.3
"""Large, so that a wrong epsilon shows."""


def rms_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_a_stack_of_branches_is_unchanged(dtype: torch.dtype, bound: float) -> None:
    rng, transform = generator(0), ResidualScaling(EPS)
    weights = [torch.randn(12, 12, generator=rng, dtype=dtype) for _ in range(6)]
    residual = 50 * torch.randn(3, 12, generator=rng, dtype=dtype)
    scaled, running_scale = residual.clone(), torch.ones(3, 1, dtype=dtype)
    for weight in weights:
        branch = rms_norm(residual)
        residual = residual + branch @ weight.T
        scaled, running_scale = transform(scaled, running_scale)
        assert float((scaled - branch).abs().max()) < bound
        scaled = scaled + transform.scale_branch(scaled, running_scale) @ weight.T
    assert float((transform.inverse(scaled, running_scale) - residual).abs().max()) < bound * float(residual.abs().max())
    assert float(running_scale.max()) > 20


def test_it_cannot_be_merged() -> None:
    transform = ResidualScaling(1e-5, "output")
    assert transform.describe() == {"symbol": "S_n", "name": "residual_scaling", "parameters": 0, "where": "output", "eps": 1e-5}
    with pytest.raises(UserError, match="cannot be merged"):
        transform.merge_into(torch.eye(2), "down")
    with pytest.raises(UserError, match="pass running_scale"):
        transform.inverse(torch.eye(2))
    with pytest.raises(UserError, match="where = 'middle'"):
        ResidualScaling(1e-5, "middle")  # type: ignore[arg-type]
