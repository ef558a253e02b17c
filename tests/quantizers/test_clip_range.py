"""Clipping ratios of weight ranges: each channel's and group's against outputs computed one ratio at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.quantizers.clip_range import RATIOS, clip_range_
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.range_method import RangeMethod

ROWS, COLUMNS = 5, 24


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantizer_of(weight: Tensor, granularity: Granularity, *, symmetric: bool) -> Quantizer:
    found = Quantizer(IntegerGrid(3, symmetric), granularity, dynamic=False, range_method=RangeMethod("min_max"), name="weight")
    found.set_range_from(weight)
    return found


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(8), PerTensor()], ids=str)
def test_the_ratio_that_leaves_the_outputs_closest(granularity: Granularity, symmetric: bool) -> None:
    weight, x = random(ROWS, COLUMNS), random(200, COLUMNS, seed=1) * (random(COLUMNS, seed=2).abs() * 3 + 0.1)
    weight[:, 3] *= 4
    quantizer = quantizer_of(weight, granularity, symmetric=symmetric)
    scale, zero = quantizer.static_qparams(weight)
    before, after = clip_range_(weight, quantizer, x.T @ x)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    size = COLUMNS // groups
    losses = []
    for ratio in RATIOS:
        rounded = ops.fake_quant(weight, scale * ratio, zero, grid=quantizer.grid, granularity=granularity)
        parts = [x[:, start : start + size] @ (rounded - weight)[:, start : start + size].T for start in range(0, COLUMNS, size)]
        losses.append(torch.stack([part.square().sum(0) for part in parts], 1))  # [rows, groups]
    errors = torch.stack(losses)
    errors = errors.sum((1, 2)) if scale.dim() == 0 else errors if scale.dim() == 2 else errors[:, :, 0]
    best = torch.tensor(RATIOS, dtype=torch.float64)[errors.argmin(0)]
    assert quantizer.scale is not None
    torch.testing.assert_close(quantizer.scale, scale * best, rtol=1e-12, atol=0)
    assert (before, after) == (pytest.approx(float(errors[0].sum())), pytest.approx(float(errors.amin(0).sum())))
    assert after < before
    assert len(set(best.flatten().tolist())) > 1 or scale.dim() == 0


def test_a_range_without_better_ones_stays_as_it_is() -> None:
    """Weights on the grid: every narrower range cuts something off."""
    weight = torch.tensor([[-3.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    quantizer = quantizer_of(weight, PerChannel(0), symmetric=True)
    assert quantizer.scale is not None
    found = quantizer.scale.clone()
    assert clip_range_(weight, quantizer, torch.eye(4, dtype=torch.float64)) == (0, 0)
    assert torch.equal(quantizer.scale, found)
