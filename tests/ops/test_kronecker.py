"""kronecker: the product of two factors, fused with fake_quant too; reference, gradient, opcheck, instruction sets, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from fptquant.quantizers.grid import IntegerGrid, PerTensor, PerToken
from tests.ops.common import DTYPES, assert_no_growth, assert_same_on_every_isa, assert_within, random
from tests.tolerances import compute_dtype

TOKENS = 37
SIZES = [(1, 1), (1, 5), (5, 1), (7, 3), (8, 8), (9, 64), (12, 17), (16, 24), (24, 24)]
PRESENT = [(True, True), (True, False), (False, True)]
GRID = IntegerGrid(4, symmetric=False)


def factors(sizes: tuple[int, int], dtype: torch.dtype, present: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    """Left and right, or absent ones, in the dtype of computation of ``dtype``."""
    wide = compute_dtype(dtype)
    return [
        (random(n, n, seed=seed) / math.sqrt(n)).to(wide) if there else torch.empty(0, dtype=wide)
        for n, seed, there in zip(sizes, (1, 2), present, strict=True)
    ]


def given(tensors: list[Tensor]) -> list[Tensor | None]:
    return [tensor.clone().requires_grad_() if tensor.numel() else None for tensor in tensors]


def quantizer(dynamic: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (TOKENS, 1) if dynamic else ()
    scale = random(*shape, seed=3).abs() * 0.1 + 0.15
    return scale.to(compute_dtype(dtype)), (random(*shape, seed=4) * 2 + 8).round().to(compute_dtype(dtype))


@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, sizes: tuple[int, int], present: tuple[bool, bool]) -> None:
    x, dy = (random(TOKENS, math.prod(sizes), dtype=dtype, seed=seed) for seed in (0, 5))
    left, right = factors(sizes, dtype, present)
    expected = reference.kronecker(x, left, right)
    gradients = reference.kronecker_backward(dy, x, left, right, True)
    leaves = [x.clone().requires_grad_(), *given([left, right])]
    actual = ops.kronecker(*leaves)
    actual.backward(dy)
    assert_within("kronecker", actual, expected, dtype)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if leaf is not None:
            assert_within("kronecker", leaf.grad, gradient, dtype)


@pytest.mark.parametrize("sizes", [(3, 4), (16, 24)], ids=str)
def test_is_the_kronecker_product(sizes: tuple[int, int]) -> None:
    x = random(2, 5, math.prod(sizes))
    left, right = factors(sizes, torch.float64)
    torch.testing.assert_close(ops.kronecker(x, left, right), x @ torch.kron(left, right).T, rtol=1e-12, atol=1e-12)
    identity = torch.eye(sizes[1], dtype=torch.float64)
    torch.testing.assert_close(ops.kronecker(x, left, None), x @ torch.kron(left, identity).T, rtol=1e-12, atol=1e-12)
    back = ops.kronecker(ops.kronecker(x, left, right), torch.linalg.inv(left), torch.linalg.inv(right))
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("present", PRESENT)
def test_gradient(present: tuple[bool, bool]) -> None:
    x = random(3, 12).requires_grad_()
    leaves = given(factors((3, 4), torch.float64, present))

    def transformed(x: Tensor, *used: Tensor) -> Tensor:
        remaining = list(used)
        return ops.kronecker(x, *(remaining.pop(0) if there else None for there in present))

    assert torch.autograd.gradcheck(transformed, [x, *(leaf for leaf in leaves if leaf is not None)])


@pytest.mark.parametrize("dynamic", [False, True], ids=["one scale", "a scale per row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_equals_reference(dtype: torch.dtype, dynamic: bool) -> None:
    sizes = (12, 17)
    x, dy = (random(TOKENS, math.prod(sizes), dtype=dtype, seed=seed) for seed in (0, 5))
    tensors, options = (x, *factors(sizes, dtype), *quantizer(dynamic, dtype)), (GRID.kind, GRID.qmin, GRID.qmax)
    expected = reference.kronecker_fake_quant(*tensors, *options)
    gradients = reference.kronecker_fake_quant_backward(dy, *tensors, *options, True)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    actual = ops.kronecker_fake_quant(*leaves, grid=GRID)
    actual.backward(dy)
    assert_within("kronecker", actual, expected, dtype)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert_within("kronecker", leaf.grad, gradient, dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["one scale", "a scale per row"])
def test_fused_is_the_two_operators_in_turn(dynamic: bool) -> None:
    """Values and their gradients bit for bit in float32; the sums of scale and zero point have another order."""
    sizes = (12, 17)
    x, dy = (random(TOKENS, math.prod(sizes), dtype=torch.float32, seed=seed) for seed in (0, 5))
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, *factors(sizes, x.dtype), *quantizer(dynamic, x.dtype))]
        if fused:
            y = ops.kronecker_fake_quant(*leaves, grid=GRID)
        else:
            granularity = PerToken() if dynamic else PerTensor()
            y = ops.fake_quant(ops.kronecker(*leaves[:3]), *leaves[3:], grid=GRID, granularity=granularity)
        y.backward(dy)
        results.append([y, *(leaf.grad for leaf in leaves)])
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results[0][4:], results[1][4:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.7])
@pytest.mark.parametrize("grid", [GRID, IntegerGrid(4)], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fused_with_ranges_of_rows_is_the_three_operators_in_turn(
    dtype: torch.dtype, grid: IntegerGrid, clip: float | None
) -> None:
    """Values and their gradients bit for bit; that of clip is a sum in another order."""
    sizes = (12, 17)
    x, dy = (random(2, TOKENS, math.prod(sizes), dtype=dtype, seed=seed) for seed in (0, 5))
    x[0, 1] = 0
    results = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, *factors(sizes, dtype))]
        factor = None if clip is None else torch.tensor(clip, dtype=dtype, requires_grad=True)
        if fused:
            y = ops.kronecker_fake_quant_dynamic(*leaves, factor, grid=grid, clip_ratio=0.9)
        else:
            product = ops.kronecker(*leaves)
            scale, zero = ops.choose_qparams(product, grid=grid, clip_ratio=0.9)
            scale = scale if factor is None else scale * factor
            y = ops.fake_quant(product, scale, zero, grid=grid, granularity=PerToken())
        y.backward(dy)
        results.append([y, *(leaf.grad for leaf in leaves), *([] if factor is None else [factor.grad])])
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results[0][4:], results[1][4:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert a.abs() > 1e-3


def test_nan_and_infinities_are_left_out_of_the_ranges_of_rows() -> None:
    x, left = random(3, 21, dtype=torch.float32), factors((3, 7), torch.float32)[0]
    x[0, 5], x[1, 8] = math.nan, math.inf
    y = ops.kronecker_fake_quant_dynamic(x, left, None, grid=GRID)
    product = ops.kronecker(x, left, None)
    expected = ops.fake_quant(product, *ops.choose_qparams(product, grid=GRID), grid=GRID, granularity=PerToken())
    assert y.isnan().any()
    assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_with_ranges_of_rows_equals_reference(dtype: torch.dtype, sizes: tuple[int, int], present: tuple[bool, bool]) -> None:
    """Ranges and zero points; values on a step's edge may take the other one in another order of sums."""
    x = random(TOKENS, math.prod(sizes), dtype=dtype)
    tensors = (x, *factors(sizes, dtype, present), torch.tensor([0.8], dtype=compute_dtype(dtype)))
    options = (0.9, False, GRID.kind, GRID.qmin, GRID.qmax)
    expected = reference.kronecker_fake_quant_dynamic(*tensors, *options)
    actual = torch.ops.fptquant.kronecker_fake_quant_dynamic(*tensors, *options)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=0)
    assert (actual[2] - expected[2]).abs().max() <= 1  # a zero point half way
    steps = ((actual[0] - expected[0]).abs() / expected[1]).to(torch.float64)
    assert (steps > 0.05).double().mean() < 0.01
    assert steps.max() < 1.1


@pytest.mark.parametrize("operators", [torch.ops.fptquant, reference], ids=["C", "reference"])
def test_no_rows_at_all(operators: Any) -> None:
    x, (left, right), none = torch.zeros(0, 12), factors((3, 4), torch.float32), torch.empty(0)
    y, scale, zero = operators.kronecker_fake_quant_dynamic(x, left, right, none, 0.9, False, 0, 0, 15)
    assert y.shape == x.shape
    assert scale.shape == zero.shape == (0, 1)
    gradients = operators.kronecker_fake_quant_backward(x, x, left, right, scale, zero, 0, 0, 15, True)
    assert [tuple(gradient.shape) for gradient in gradients[:4]] == [(0, 12), (3, 3), (4, 4), (0, 1)]
    assert not gradients[1].any()


def test_opcheck_with_ranges_of_rows() -> None:
    x, (left, right) = random(4, 12, dtype=torch.float32), factors((3, 4), torch.float32)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, left, right))
    for clip in (torch.tensor(0.8, requires_grad=True), torch.empty(0)):
        arguments = (*leaves, clip, 0.9, False, 0, 0, 15)
        torch.library.opcheck(torch.ops.fptquant.kronecker_fake_quant_dynamic.default, arguments)


def test_opcheck() -> None:
    x, (left, right) = random(4, 12, dtype=torch.float32), factors((3, 4), torch.float32)
    scale, zero, none = torch.tensor(0.2), torch.tensor(8.0), torch.empty(0)
    leaves = tuple(tensor.requires_grad_() for tensor in (x, left, right))
    torch.library.opcheck(torch.ops.fptquant.kronecker.default, leaves)
    torch.library.opcheck(torch.ops.fptquant.kronecker.default, (x, none, right))
    fused = (*leaves, scale.requires_grad_(), zero.requires_grad_(), 0, 0, 15)
    torch.library.opcheck(torch.ops.fptquant.kronecker_fake_quant.default, fused)
    plain = tuple(tensor.detach() for tensor in fused[:5])
    for wanted in (False, True):  # the gradient of x
        torch.library.opcheck(torch.ops.fptquant.kronecker_backward.default, (plain[0], *plain[:3], wanted))
        options = (plain[0], *plain, 0, 0, 15, wanted)
        torch.library.opcheck(torch.ops.fptquant.kronecker_fake_quant_backward.default, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    for sizes in SIZES:
        x, dy = (random(70, math.prod(sizes), dtype=dtype, seed=seed) for seed in (0, 5))
        x[0, 0] = math.nan
        plain, none = tuple(factors(sizes, dtype)), torch.empty(0, dtype=compute_dtype(dtype))
        scale = torch.tensor([0.2], dtype=compute_dtype(dtype))

        def call(x: Tensor = x, dy: Tensor = dy, plain: tuple = plain, none: Tensor = none, scale: Tensor = scale) -> tuple:
            quantized = (*plain, scale, none, 0, -8, 7)
            return (
                torch.ops.fptquant.kronecker(x, *plain),
                torch.ops.fptquant.kronecker(x, plain[0], none),
                *torch.ops.fptquant.kronecker_backward(dy, x, *plain, True),
                torch.ops.fptquant.kronecker_fake_quant(x, *quantized),
                *torch.ops.fptquant.kronecker_fake_quant_backward(dy, x, *quantized, True),
                *torch.ops.fptquant.kronecker_fake_quant_dynamic(x, *plain, scale, 0.9, False, 0, 0, 15),
            )

        assert_same_on_every_isa(call)


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33, 97])
def test_sums_over_any_number_of_tokens(tokens: int) -> None:
    x, (left, right) = random(tokens, 12), factors((3, 4), torch.float64)
    leaves = given([left, right])
    ops.kronecker(x, *leaves).sum().backward()
    gradients = reference.kronecker_backward(torch.ones_like(x), x, left, right, True)
    for leaf, gradient in zip(leaves, gradients[1:], strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-12, atol=1e-12)


def test_errors_name_the_shapes() -> None:
    x, left = torch.zeros(5, 12), torch.eye(3)
    with pytest.raises(UserError, match="left and right are none and none; at least one must be given"):
        ops.kronecker(x, None, None)
    with pytest.raises(UserError, match=r"are \[3, 4\] and none; .* square matrices"):
        ops.kronecker(x, torch.zeros(3, 4), None)
    with pytest.raises(UserError, match=r"x has shape \[5, 12\], which left and right of \[3, 3\] and \[5, 5\] do not fit"):
        ops.kronecker(x, left, torch.eye(5))
    with pytest.raises(UserError, match=r"scale has 2 entries; x \[5, 12\] needs 1 or 5"):
        ops.kronecker_fake_quant(x, left, None, torch.ones(2), grid=GRID)
    with pytest.raises(UserError, match="clip has 2 entries; it needs 1"):
        ops.kronecker_fake_quant_dynamic(x, left, None, torch.ones(2), grid=GRID)
    with pytest.raises(RuntimeError, match=r"clip_ratio = 2 must lie in \(0, 1\]"):
        ops.kronecker_fake_quant_dynamic(x, left, None, grid=GRID, clip_ratio=2)
    with pytest.raises(RuntimeError, match=r"scale\[0\] = -1 must be positive and finite"):
        ops.kronecker_fake_quant_dynamic(x, left, None, torch.tensor(-1.0), grid=GRID)
    with pytest.raises(RuntimeError, match=r"scale\[0\] = inf must be positive and finite"):
        ops.kronecker_fake_quant_dynamic(torch.full((1, 3), 3e38), left, None, torch.tensor(1e3), grid=GRID)
    with pytest.raises(RuntimeError, match="the last axis of x has 12 values, not 3 x 5"):
        torch.ops.fptquant.kronecker(x, left, torch.eye(5))
    with pytest.raises(RuntimeError, match="give at least one of left and right"):
        torch.ops.fptquant.kronecker(x, torch.empty(0), torch.empty(0))
    with pytest.raises(RuntimeError, match="dtype of computation"):
        torch.ops.fptquant.kronecker(x, left.double(), torch.empty(0))


def test_a_failing_call_leaks_nothing() -> None:
    x, left, none = torch.zeros(1024, 1024), torch.eye(32), torch.empty(0)
    arguments = (x, left, left, torch.zeros(1), none, 0, -8, 7)
    assert_no_growth(lambda: torch.ops.fptquant.kronecker_fake_quant(*arguments), "must be positive")
    assert_no_growth(lambda: torch.ops.fptquant.kronecker_fake_quant_backward(x, *arguments, True), "must be positive")
