"""gptq_: reference, the objective that it minimizes, ranges of columns, order of columns, instruction sets, opcheck, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference_gptq
from fptquant.quantizers.grid import IntegerGrid, PerChannel
from tests.ops.common import assert_no_growth, assert_same_on_every_isa, random
from tests.tolerances import UNIT

DTYPES = [torch.float32, torch.float64]
GRID = IntegerGrid(4)
GPTQ = torch.ops.fptquant.gptq_.default


def hessian(columns: int, seed: int = 0) -> Tensor:
    """Of correlated inputs, as activations are."""
    inputs = random(3 * columns, columns, seed=seed) @ (torch.eye(columns, dtype=torch.float64) + 0.3 * random(columns, columns))
    return inputs.T @ inputs


def factor_of(h: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).contiguous()


def scales(weight: Tensor, groups: int = 1) -> Tensor:
    """Min-max over equal groups of columns."""
    return weight.unflatten(1, (groups, -1)).abs().amax(-1) / 7


def problem(rows: int, columns: int, dtype: torch.dtype, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """weight, factor, scale."""
    weight = random(rows, columns)
    return weight.to(dtype), factor_of(hessian(columns)).to(dtype), scales(weight, groups).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (5, 65), (17, 63), (33, 200), (64, 130)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_equals_reference_bit_for_bit(rows: int, columns: int, dtype: torch.dtype, asymmetric: bool) -> None:
    weight, factor, scale = problem(rows, columns, dtype)
    zero = random(rows, 1, dtype=dtype, seed=3) * 2 if asymmetric else scale.new_empty(0)
    expected, found = weight.clone(), weight.clone()
    options = (0, columns, GRID.kind, GRID.qmin, GRID.qmax)
    expected_loss = reference_gptq.gptq_(expected, factor, scale, zero, torch.empty(0, dtype=torch.int64), *options)
    loss = ops.gptq_(found, factor, scale, zero if asymmetric else None, grid=GRID)
    assert torch.equal(found, expected)
    assert torch.equal(loss, expected_loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_that_of_the_outputs(dtype: torch.dtype) -> None:
    """sum of e_j^2 = (w - q) H (w - q)^T: an identity, whose error falls with the dtype."""
    weight, _, scale = problem(20, 96, dtype)
    h = hessian(96)
    found = weight.clone()
    loss = ops.gptq_(found, factor_of(h).to(dtype), scale, grid=GRID)
    difference = (weight - found).double()
    expected = ((difference @ h) * difference).sum(-1)
    torch.testing.assert_close(loss, expected, rtol=float(torch.linalg.cond(h)) * UNIT[dtype], atol=0)
    assert torch.equal(found, ops.fake_quant(found, scale, grid=GRID, granularity=PerChannel(0)))  # it lies on the grid
    nearest = ops.fake_quant(weight, scale, grid=GRID, granularity=PerChannel(0))
    rounded = ((weight - nearest).double() @ h * (weight - nearest).double()).sum(-1)
    assert loss.sum() < 0.6 * rounded.sum()


def test_is_the_best_of_all_roundings_of_two_columns() -> None:
    """Of all that round the first column to nearest: the second makes up for its error as well as the grid allows."""
    h = torch.tensor([[2.0, 1.5], [1.5, 3.0]], dtype=torch.float64)
    for seed in range(20):
        weight = random(1, 2, seed=seed) * 3
        found = weight.clone()
        loss = ops.gptq_(found, factor_of(h), torch.ones(1, 1, dtype=torch.float64), grid=GRID).item()
        first = weight[0, 0].round().clamp(GRID.qmin, GRID.qmax)
        others = []
        for second in range(GRID.qmin, GRID.qmax + 1):
            difference = weight[0] - torch.stack([first, torch.tensor(float(second), dtype=torch.float64)])
            others.append((difference @ h @ difference).item())
        assert loss == pytest.approx(min(others), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranges_of_columns_one_after_the_other(dtype: torch.dtype) -> None:
    weight, factor, scale = problem(18, 150, dtype)
    whole, parts = weight.clone(), weight.clone()
    loss = ops.gptq_(whole, factor, scale, grid=GRID)
    cuts = [0, 7, 7, 64, 65, 150]
    losses = [ops.gptq_(parts, factor, scale, grid=GRID, begin=a, end=b) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(whole, parts)
    torch.testing.assert_close(torch.stack(losses).sum(0), loss, rtol=1e-12, atol=0)


def test_groups_have_scales_of_their_own() -> None:
    weight, factor, scale = problem(9, 96, torch.float64, groups=3)
    group = torch.arange(96) // 32
    found = weight.clone()
    ops.gptq_(found, factor, scale, grid=GRID, group=group)
    expected = weight.clone()
    for index in range(3):
        ops.gptq_(expected, factor, scale[:, index : index + 1], grid=GRID, begin=32 * index, end=32 * index + 32)
    assert torch.equal(found, expected)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    permuted = weight[:, order].contiguous()
    h = hessian(96)[order][:, order]
    ops.gptq_(permuted, factor_of(h), scale, grid=GRID, group=group[order])
    back = permuted[:, order.argsort()]
    steps = back / scale.repeat_interleave(32, dim=1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    weight, factor, scale = problem(70, 201, dtype)

    def run() -> list[Tensor]:
        found = weight.clone()
        return [ops.gptq_(found, factor, scale, grid=GRID), found]

    assert_same_on_every_isa(run)


def test_opcheck_and_other_devices() -> None:
    weight, factor, scale = problem(4, 6, torch.float32)
    absent, groups = scale.new_empty(0), torch.empty(0, dtype=torch.int64)
    torch.library.opcheck(GPTQ, (weight.clone(), factor, scale, absent, groups, 1, 5, GRID.kind, GRID.qmin, GRID.qmax))
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("fptquant::gptq_", "CUDA")


def test_edges() -> None:
    for shape in ((0, 4), (3, 0)):
        weight = torch.zeros(shape)
        loss = ops.gptq_(weight, torch.eye(shape[1]), torch.ones(shape[0], 1), grid=GRID)
        assert loss.tolist() == [0.0] * shape[0]
    weight, factor, scale = problem(5, 40, torch.float32)
    weight[2, 3] = torch.nan
    loss = ops.gptq_(weight, factor, scale, grid=GRID)
    assert loss.isnan().tolist() == [False, False, True, False, False]


def test_errors() -> None:
    weight, factor, scale = problem(4, 6, torch.float32)
    for arguments, options, message in (
        ((weight.bfloat16(), factor, scale), {}, "must be a contiguous matrix in float32 or float64"),
        ((weight.T, factor, scale), {}, "must be a contiguous matrix"),
        ((weight, factor[:5], scale), {}, r"factor \[5, 6\] must be \[6, 6\]"),
        ((weight, factor, scale[:3]), {}, r"scale \[3, 1\] must be \[4, groups\]"),
        ((weight, factor, scale, scale[:1]), {}, r"zero_point \[1, 1\] must have the shape of scale \[4, 1\]"),
        ((weight, factor.double(), scale), {}, "factor is torch.float64, the weight torch.float32"),
        ((weight, factor, scale), {"begin": 3, "end": 2}, "columns 3 to 2 are not within the 6"),
        ((weight, factor, scale), {"group": torch.zeros(5, dtype=torch.int64)}, r"group \[5\] torch.int64 must be \[6\] int64"),
    ):
        with pytest.raises(UserError, match=message):
            ops.gptq_(*arguments, grid=GRID, **options)
    broken = factor.clone()
    broken[2, 2] = 0
    with pytest.raises(RuntimeError, match=r"factor\[2, 2\] = 0 must be positive and finite; damp the Hessian more"):
        ops.gptq_(weight, broken, scale, grid=GRID)
    with pytest.raises(RuntimeError, match="column 5 belongs to group 1, but there are 1"):
        ops.gptq_(weight, factor, scale, grid=GRID, group=torch.tensor([0, 0, 0, 0, 0, 1]))
    large = torch.randn(512, 512)
    assert_no_growth(lambda: ops.gptq_(large, torch.eye(512), torch.zeros(512, 1), grid=GRID), "must be positive")
