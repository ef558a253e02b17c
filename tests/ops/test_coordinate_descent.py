"""coordinate_descent_: reference, the loss, that no single column can do better, order, instruction sets, opcheck, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference_coordinate_descent
from fptquant.quantizers.grid import IntegerGrid, PerChannel
from tests.ops.common import assert_no_growth, assert_same_on_every_isa, random
from tests.ops.test_gptq import DTYPES, factor_of, hessian, scales
from tests.tolerances import UNIT

GRID = IntegerGrid(4)
MANY = 100
DESCENT = torch.ops.fptquant.coordinate_descent_.default


def problem(rows: int, columns: int, dtype: torch.dtype = torch.float64, groups: int = 1) -> tuple[Tensor, ...]:
    """The weight rounded to nearest, the weight, the Hessian, scales."""
    weight, scale = random(rows, columns), scales(random(rows, columns), groups)
    wide = scale.repeat_interleave(columns // groups, 1) if columns else weight
    nearest = (weight / wide).round().clamp(GRID.qmin, GRID.qmax) * wide
    return tuple(part.to(dtype) for part in (nearest, weight, hessian(columns), scale))


def losses(weight: Tensor, quantized: Tensor, h: Tensor) -> Tensor:
    difference = (weight - quantized).double()
    return ((difference @ h.double()) * difference).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 64), (5, 65), (17, 63), (33, 130)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_equals_reference_bit_for_bit(rows: int, columns: int, dtype: torch.dtype, asymmetric: bool) -> None:
    nearest, weight, h, scale = problem(rows, columns, dtype)
    zero = random(rows, 1, dtype=dtype, seed=3) * 2 if asymmetric else scale.new_empty(0)
    expected, found = nearest.clone(), nearest.clone()
    options = (2, GRID.kind, GRID.qmin, GRID.qmax)
    expected_loss = reference_coordinate_descent.coordinate_descent_(
        expected, weight, h, scale, zero, torch.empty(0, dtype=torch.int64), *options
    )
    loss = ops.coordinate_descent_(found, weight, h, scale, zero if asymmetric else None, grid=GRID, sweeps=2)
    assert torch.equal(found, expected)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_is_that_of_the_outputs_and_falls_with_every_sweep(dtype: torch.dtype) -> None:
    nearest, weight, h, scale = problem(20, 96, dtype)
    found, seen = nearest.clone(), []
    for sweeps in (0, 1, 1, 1):
        loss = ops.coordinate_descent_(found, weight, h, scale, grid=GRID, sweeps=sweeps)
        torch.testing.assert_close(loss, losses(weight, found, h), rtol=1e4 * UNIT[dtype], atol=0)
        seen.append(loss)
    assert all(bool((later <= earlier * (1 + 1e4 * UNIT[dtype])).all()) for earlier, later in itertools.pairwise(seen))
    assert seen[-1].sum() < 0.6 * seen[0].sum()
    assert torch.equal(found, ops.fake_quant(found, scale, grid=GRID, granularity=PerChannel(0)))  # it lies on the grid


def test_it_improves_what_gptq_leaves() -> None:
    _, weight, h, scale = problem(40, 96)
    found = weight.clone()
    before = ops.gptq_(found, factor_of(h), scale, grid=GRID)
    after = ops.coordinate_descent_(found, weight, h, scale, grid=GRID, sweeps=MANY)
    assert bool((after <= before * (1 + 1e-9)).all())
    assert after.sum() < 0.99 * before.sum()


def test_at_the_end_no_other_value_of_any_entry_is_better() -> None:
    nearest, weight, h, scale = problem(3, 12)
    loss = ops.coordinate_descent_(nearest, weight, h, scale, grid=GRID, sweeps=MANY)
    for column, value in itertools.product(range(12), range(GRID.qmin, GRID.qmax + 1)):
        other = nearest.clone()
        other[:, column] = value * scale[:, 0]
        assert bool((losses(weight, other, h) >= loss * (1 - 1e-9)).all())
    settled = nearest.clone()
    ops.coordinate_descent_(settled, weight, h, scale, grid=GRID, sweeps=1)
    assert torch.equal(settled, nearest)


def test_groups_have_scales_of_their_own_and_rows_do_not_depend_on_each_other() -> None:
    nearest, weight, h, scale = problem(19, 96, groups=3)
    group, found = torch.arange(96) // 32, nearest.clone()
    loss = ops.coordinate_descent_(found, weight, h, scale, grid=GRID, group=group, sweeps=3)
    steps = found / scale.repeat_interleave(32, dim=1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert loss.sum() < 0.7 * losses(weight, nearest, h).sum()
    alone = nearest[18:].clone()
    ops.coordinate_descent_(alone, weight[18:], h, scale[18:], grid=GRID, group=group, sweeps=3)
    assert torch.equal(alone, found[18:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    nearest, weight, h, scale = problem(70, 201, dtype)

    def run() -> list[Tensor]:
        found = nearest.clone()
        return [ops.coordinate_descent_(found, weight, h, scale, grid=GRID, sweeps=2), found]

    assert_same_on_every_isa(run)


def test_opcheck_and_other_devices() -> None:
    nearest, weight, h, scale = problem(4, 6, torch.float32)
    absent, groups = scale.new_empty(0), torch.empty(0, dtype=torch.int64)
    torch.library.opcheck(DESCENT, (nearest, weight, h, scale, absent, groups, 2, GRID.kind, GRID.qmin, GRID.qmax))
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("fptquant::coordinate_descent_", "CUDA")


def test_edges() -> None:
    for shape in ((0, 4), (3, 0)):
        quantized = torch.zeros(shape)
        loss = ops.coordinate_descent_(quantized, quantized, torch.eye(shape[1]), torch.ones(shape[0], 1), grid=GRID)
        assert loss.tolist() == [0.0] * shape[0]
    nearest, weight, h, scale = problem(5, 40, torch.float32)
    weight[2, 3] = torch.nan
    loss = ops.coordinate_descent_(nearest, weight, h, scale, grid=GRID)
    assert loss.isnan().tolist() == [False, False, True, False, False]


def test_errors() -> None:
    nearest, weight, h, scale = problem(4, 6, torch.float32)
    for arguments, options, message in (
        ((nearest.bfloat16(), weight, h, scale), {}, "must be a contiguous matrix in float32 or float64"),
        ((nearest, weight[:3], h, scale), {}, r"weight \[3, 6\] must have the shape of quantized \[4, 6\]"),
        ((nearest, weight, h[:5], scale), {}, r"hessian \[5, 6\] must be \[6, 6\]"),
        ((nearest, weight, h, scale[:3]), {}, r"scale \[3, 1\] must be \[4, groups\]"),
        ((nearest, weight, h, scale, scale[:1]), {}, r"zero_point \[1, 1\] must have the shape of scale \[4, 1\]"),
        ((nearest, weight, h.double(), scale), {}, "hessian is torch.float64, quantized torch.float32"),
        ((nearest, weight, h, scale), {"sweeps": -1}, "sweeps = -1 is negative"),
        ((nearest, weight, h, scale), {"group": torch.zeros(5, dtype=torch.int64)}, r"group \[5\] torch.int64 must be \[6\] int64"),
    ):
        with pytest.raises(UserError, match=message):
            ops.coordinate_descent_(*arguments, grid=GRID, **options)
    broken = h.clone()
    broken[2, 2] = 0
    with pytest.raises(RuntimeError, match=r"hessian\[2, 2\] = 0 must be positive and finite; damp the Hessian more"):
        ops.coordinate_descent_(nearest, weight, broken, scale, grid=GRID)
    with pytest.raises(RuntimeError, match="column 5 belongs to group 1, but there are 1"):
        ops.coordinate_descent_(nearest, weight, h, scale, grid=GRID, group=torch.tensor([0, 0, 0, 0, 0, 1]))
    large = torch.zeros(512, 512)
    assert_no_growth(
        lambda: ops.coordinate_descent_(large, large, torch.eye(512), torch.zeros(512, 1), grid=GRID), "must be positive"
    )
