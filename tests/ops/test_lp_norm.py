"""lp_norm: reference, gradient, opcheck, edge cases, instruction sets, errors."""

from __future__ import annotations

import math

import pytest
import torch

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from tests.ops.common import DTYPES, LENGTHS, assert_no_growth, assert_same_on_every_isa, assert_within, random
from tests.tolerances import compute_dtype

EXPONENTS = [1.0, 2.0, 2.4, 3.0, 4.0, 7.5]


@pytest.mark.parametrize("p", EXPONENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, p: float) -> None:
    wide = compute_dtype(dtype)
    weight = random(24, 19, dtype=dtype)
    angle, log_scale = random(3, 2, dtype=wide, seed=1), random(3, 2, dtype=wide, seed=2) * 0.3
    row, column = random(24, dtype=wide, seed=3) * 0.3, random(19, dtype=wide, seed=4) * 0.3
    pairs = [
        (
            torch.ops.fptquant.lp_norm_query_key(weight, angle, log_scale, 2, True, p),
            reference.lp_norm_query_key(weight, angle, log_scale, 2, True, p),
        ),
        (
            torch.ops.fptquant.lp_norm_scale(weight, row, column, p),
            reference.lp_norm_scale(weight, row, column, p),
        ),
    ]
    for actual, expected in pairs:
        for mine, theirs in zip(actual, expected, strict=True):
            assert_within("lp_norm", mine, theirs, dtype)


def test_equals_the_norm_of_the_merged_weight() -> None:
    weight, angle, log_scale = random(16, 9), random(2, 4, seed=1), random(2, 4, seed=2)
    merged = ops.merge_query_key(weight, angle, log_scale)
    torch.testing.assert_close(ops.lp_norm_query_key(weight, angle, log_scale), merged.pow(4).sum())
    row, column = random(16, seed=3), random(9, seed=4)
    merged = ops.merge_scale(weight, row, column)
    torch.testing.assert_close(ops.lp_norm_scale(weight, row, column, p=3.0), merged.abs().pow(3).sum())


@pytest.mark.parametrize("p", [2.0, 2.4, 3.0, 4.0])
def test_gradient(p: float) -> None:
    weight = random(8, 5)
    leaves = random(2, 2, seed=1).requires_grad_(), (random(2, 2, seed=2) * 0.3).requires_grad_()
    for inverse in (False, True):
        assert torch.autograd.gradcheck(lambda a, s, i=inverse: ops.lp_norm_query_key(weight, a, s, inverse=i, p=p), leaves)
    row, column = (random(8, seed=3) * 0.3).requires_grad_(), (random(5, seed=4) * 0.3).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, c: ops.lp_norm_scale(weight, r, c, p=p), (row, column))
    assert torch.autograd.gradcheck(lambda r: ops.lp_norm_scale(weight, r, p=p), (row,))
    assert torch.autograd.gradcheck(lambda c: ops.lp_norm_scale(weight, None, c, p=p), (column,))


def test_gradient_reaches_float32_parameters_once() -> None:
    row = torch.zeros(8, requires_grad=True)
    weight = random(8, 5, dtype=torch.float32).requires_grad_()
    value = ops.lp_norm_scale(weight, row)
    (2 * value).backward()
    assert value.dtype == torch.float64
    assert row.grad.dtype == torch.float32
    torch.testing.assert_close(row.grad, 8 * weight.detach().pow(4).sum(dim=1))
    assert weight.grad is None


def test_opcheck() -> None:
    weight = random(8, 5, dtype=torch.float32)
    angle, row, column = (random(*shape, dtype=torch.float32, seed=1).requires_grad_() for shape in ((2, 2), (8,), (5,)))
    log_scale = random(2, 2, dtype=torch.float32, seed=2).requires_grad_()
    torch.library.opcheck(torch.ops.fptquant.lp_norm_query_key.default, (weight, angle, log_scale, 1, False, 4.0))
    torch.library.opcheck(torch.ops.fptquant.lp_norm_scale.default, (weight, row, column, 4.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_and_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    wide = compute_dtype(dtype)
    angle, row = random(3, 2, dtype=wide, seed=1), random(24, dtype=wide, seed=3)
    for columns in LENGTHS:
        weight, column = random(24, columns, dtype=dtype), random(columns, dtype=wide, seed=4)
        if columns > 3:
            weight[0, :3] = torch.tensor([math.nan, math.inf, -0.0])
        for p in (2.4, 4.0):
            assert_same_on_every_isa(
                lambda w=weight, c=column, p=p: (
                    *torch.ops.fptquant.lp_norm_query_key(w, angle, angle, 2, False, p),
                    *torch.ops.fptquant.lp_norm_scale(w, row, c, p),
                )
            )


def test_edges() -> None:
    assert ops.lp_norm_scale(torch.empty(0, 4)) == 0
    assert ops.lp_norm_query_key(torch.zeros(4, 3), torch.zeros(1, 2), torch.zeros(1, 2), p=1.0) == 0
    angle = torch.zeros(1, 2, requires_grad=True)
    ops.lp_norm_query_key(torch.zeros(4, 3), angle, torch.zeros(1, 2), p=1.0).backward()
    assert torch.equal(angle.grad, torch.zeros(1, 2))
    assert ops.lp_norm_scale(torch.tensor([[math.nan]])).isnan()
    assert ops.lp_norm_scale(torch.tensor([[1e-20]])).item() == pytest.approx(1e-80, rel=1e-6)  # beyond float32


def test_errors() -> None:
    weight = torch.zeros(4, 3)
    with pytest.raises(UserError, match=r"p = 0\.5 must lie between 1 and 16"):
        ops.lp_norm_scale(weight, p=0.5)
    with pytest.raises(UserError, match="p = nan must lie"):
        ops.lp_norm_query_key(weight, torch.zeros(1, 2), torch.zeros(1, 2), p=math.nan)
    with pytest.raises(UserError, match=r"row_log_scale has shape \[3\]"):
        ops.lp_norm_scale(weight, torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"p = 0\.5 must lie between 1 and 16"):
        torch.ops.fptquant.lp_norm_scale(weight, torch.empty(0), torch.empty(0), 0.5)


def test_a_failing_call_leaks_nothing() -> None:
    weight, angle = torch.zeros(1024, 1024), torch.zeros(8, 64)
    assert_no_growth(lambda: torch.ops.fptquant.lp_norm_query_key(weight, angle, angle, 1, False, 99.0), "p = 99")
