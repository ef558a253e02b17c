"""fake_quant: reference, gradient, opcheck, edge cases, instruction sets, threads, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant._core import build_info, select_isa
from fptquant.errors import UserError
from fptquant.ops import reference
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor, PerToken, channel_layout
from tests.ops.common import assert_no_growth

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1), PerGroup(8), PerToken()]
LENGTHS = [0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 1023, 16385]


def inputs(
    shape: tuple[int, ...], granularity: Granularity, dtype: torch.dtype, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(math.prod(shape) + 1)
    layout = channel_layout(granularity, shape)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    scale = (torch.rand(layout.scale_shape, generator=generator, dtype=torch.float64) * 0.3 + 0.1).to(wide)
    zero = None if symmetric else torch.randint(0, 15, layout.scale_shape, generator=generator).to(wide)
    return x, scale, zero


def expected(
    x: Tensor, scale: Tensor, zero: Tensor | None, granularity: Granularity, grid: IntegerGrid, dy: Tensor
) -> tuple[Tensor, ...]:
    layout = channel_layout(granularity, x.shape)
    options = (layout.outer, layout.channels, layout.inner, grid.qmin, grid.qmax)
    zero = x.new_empty(0, dtype=scale.dtype) if zero is None else zero
    return reference.fake_quant(x, scale, zero, *options), *reference.fake_quant_backward(dy, x, scale, zero, *options)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, granularity: Granularity, symmetric: bool) -> None:
    grid = IntegerGrid(4, symmetric)
    x, scale, zero = inputs((3, 6, 40), granularity, dtype, symmetric)
    dy = torch.randn(x.shape).to(dtype)
    y, dx, dscale, dzero = expected(x, scale, zero, granularity, grid, dy)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, scale, *([] if zero is None else [zero]))]
    result = ops.fake_quant(*leaves, grid=grid, granularity=granularity)
    result.backward(dy)
    assert torch.equal(result, y)
    assert torch.equal(leaves[0].grad, dx)
    # Sums of at most 720 products: order matters by a few units in the last place of the float32 result.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(leaves[1].grad, dscale, rtol=tolerance, atol=tolerance)
    if zero is not None:
        torch.testing.assert_close(leaves[2].grad, dzero, rtol=tolerance, atol=tolerance)


def test_division_and_ties_to_even() -> None:
    scale = torch.tensor(0.1)
    x = (torch.arange(-75, 75).float() + 0.5) * scale
    grid = IntegerGrid(8)
    assert torch.equal(ops.fake_quant(x, scale, grid=grid), (x / scale).round().clamp(-128, 127) * scale)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(4), PerToken()], ids=str)
def test_scale_and_zero_point_gradients_are_the_derivatives(granularity: Granularity) -> None:
    """Away from the steps of rint, y is smooth in scale and zero_point outside the grid, and LSQ's formula inside."""
    x = torch.full((4, 8), 9.03, dtype=torch.float64)
    x[::2] *= -1
    _, scale, zero = inputs((4, 8), granularity, torch.float64, symmetric=False)
    scale.requires_grad_()

    def clamped(scale: Tensor) -> Tensor:
        return ops.fake_quant(x, scale, zero, grid=IntegerGrid(4, False), granularity=granularity)

    assert torch.autograd.gradcheck(clamped, (scale,))
    inside = torch.tensor([0.43], dtype=torch.float64)
    step = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    ops.fake_quant(inside, step, grid=IntegerGrid(4)).sum().backward()
    assert step.grad is not None
    assert step.grad.item() == pytest.approx(4 - 4.3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_opcheck(symmetric: bool) -> None:
    x, scale, zero = inputs((4, 6), PerChannel(0), torch.float32, symmetric)
    zero = torch.empty(0) if zero is None else zero
    arguments = (x.requires_grad_(), scale.requires_grad_(), zero.requires_grad_(not symmetric), 6, 0, -8, 7)
    torch.library.opcheck(torch.ops.fptquant.fake_quant.default, arguments)
    plain = tuple(tensor.detach() for tensor in arguments[:3])
    torch.library.opcheck(torch.ops.fptquant.fake_quant_backward.default, (plain[0], *plain, 6, 0, -8, 7))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_and_instruction_set_bit_for_bit(dtype: torch.dtype, length: int) -> None:
    grid = IntegerGrid(4, False)
    x, scale, zero = inputs((3, length), PerChannel(0), dtype, False)
    if length > 4:
        x[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-42 if dtype == torch.float32 else 5e-8])
    dy = torch.randn(x.shape).to(dtype)
    results = []
    try:
        for isa in build_info()["isas_built"].split(", "):
            try:
                select_isa(isa)
            except ValueError:  # this processor lacks it
                continue
            y = ops.fake_quant(x, scale, zero, grid=grid, granularity=PerChannel(0))
            gradients = torch.ops.fptquant.fake_quant_backward(dy, x, scale, zero, length, 0, grid.qmin, grid.qmax)
            results.append((y, *gradients))
    finally:
        select_isa(None)
    for result in results:
        for mine, first in zip(result, results[0], strict=True):
            assert torch.equal(mine.nan_to_num(77), first.nan_to_num(77))
    if length > 4:
        edge = results[0][0][0, :3].double()
        low, high = (0 - zero[0]) * scale[0], (15 - zero[0]) * scale[0]
        assert edge[0].isnan()
        assert edge[1:].tolist() == [high.to(dtype).item(), low.to(dtype).item()]


def test_threads_do_not_change_a_bit() -> None:
    x, scale, _ = inputs((700, 333), PerTensor(), torch.float32, True)
    dy, threads, results = torch.randn(x.shape), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.ops.fptquant.fake_quant_backward(dy, x, scale, torch.empty(0), x.numel(), 0, -8, 7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_compiles_without_a_graph_break() -> None:
    x, scale, _ = inputs((4, 6), PerChannel(0), torch.float32, True)

    def doubled(x: Tensor) -> Tensor:
        return ops.fake_quant(x * 2, scale, grid=IntegerGrid(4), granularity=PerChannel(0))

    assert torch.equal(torch.compile(doubled, fullgraph=True, backend="aot_eager")(x), doubled(x))


def test_not_contiguous_is_made_so() -> None:
    x, scale, _ = inputs((6, 4), PerChannel(0), torch.float32, True)
    result = ops.fake_quant(x.t(), scale[:4], grid=IntegerGrid(4), granularity=PerChannel(0))
    assert torch.equal(result, ops.fake_quant(x.t().contiguous(), scale[:4], grid=IntegerGrid(4), granularity=PerChannel(0)))


def test_errors_name_the_cause() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(UserError, match=r"scale has shape \[2\].*needs \[3\]"):
        ops.fake_quant(x, torch.ones(2), grid=IntegerGrid(4), granularity=PerChannel(0))
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(RuntimeError, match=r"scale\[1\] = .* must be positive and finite"):
            ops.fake_quant(x, torch.tensor([1.0, bad, 1.0]), grid=IntegerGrid(4), granularity=PerChannel(0))
    with pytest.raises(RuntimeError, match="x must be float32"):
        torch.ops.fptquant.fake_quant(x.long(), torch.ones(1), torch.empty(0), 12, 0, -8, 7)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.fptquant.fake_quant(x.t(), torch.ones(1), torch.empty(0), 12, 0, -8, 7)
    with pytest.raises(RuntimeError, match="grid kind 5"):
        torch.ops.fptquant.fake_quant(x, torch.ones(1), torch.empty(0), 12, 5, -8, 7)
    with pytest.raises(UserError, match="bits = 9"):
        IntegerGrid(9)
    with pytest.raises(UserError, match="does not divide the last axis"):
        ops.fake_quant(x, torch.ones(1), grid=IntegerGrid(4), granularity=PerGroup(3))


def test_a_failing_call_leaks_nothing() -> None:
    large, bad = torch.randn(1024, 1024), torch.zeros(1024)

    assert_no_growth(lambda: ops.fake_quant(large, bad, grid=IntegerGrid(4), granularity=PerChannel(0)), "must be positive")


def test_the_reference_serves_devices_without_a_kernel() -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key("fptquant::fake_quant", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fptquant::fake_quant", "CPU")
