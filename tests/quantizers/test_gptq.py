"""GPTQ of one weight: the Hessian, its factor, and rounding as the paper defines it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.quantizers.gptq import Factor, GPTQOptions, Hessian, factorize, gptq_round
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.ranges import RangeMethod
from tests.ops.common import random
from tests.quantizers.obq import obq
from tests.tolerances import UNIT

ROWS, COLUMNS = 6, 24
IN_ORDER, ORDERED = GPTQOptions(), GPTQOptions(act_order=True)


def hessian(columns: int = COLUMNS, inputs: int = 100) -> Tensor:
    """Of correlated inputs of very different sizes."""
    x = random(inputs, columns, seed=1) @ (torch.eye(columns, dtype=torch.float64) + 0.3 * random(columns, columns, seed=2))
    x = x * (1 + 3 * random(columns, seed=3).abs())
    return x.T @ x


def quantizer(weight: Tensor, granularity: Granularity, *, symmetric: bool = True, method: str = "min_max") -> Quantizer:
    made = Quantizer(IntegerGrid(4, symmetric), granularity, range_method=RangeMethod(method), name="w")  # type: ignore[arg-type]
    made.set_range_from(weight)
    made.mode = "on"
    return made


def error(weight: Tensor, rounded: Tensor, h: Tensor) -> float:
    difference = weight - rounded
    return float(((difference @ h) * difference).sum())


def damped(h: Tensor, share: float) -> Tensor:
    return h + share * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def of_each_entry(part: Tensor | None) -> Tensor:
    """A scale or zero point of any granularity as [ROWS, COLUMNS]."""
    assert part is not None
    by_row = part.expand(ROWS)[:, None] if part.dim() < 2 else part
    return by_row.repeat_interleave(COLUMNS // by_row.shape[1], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_hessian_is_the_sum_of_products(dtype: torch.dtype) -> None:
    """More inputs and more columns than are worked on at once; the error falls with the dtype of the sums."""
    inputs = random(2, 2100, 300, dtype=dtype)
    found = Hessian(300, inputs.device)
    for part in inputs:
        found.add(part)
    flat = inputs.double().flatten(0, 1)
    expected, unit = flat.T @ flat, UNIT[torch.promote_types(dtype, torch.float32)]
    assert torch.allclose(found.matrix(), expected, rtol=0, atol=2048 * unit * float(expected.max()))
    assert torch.equal(found.matrix(), found.matrix().T)


def test_inputs_can_count_more_or_less() -> None:
    """More rows than are summed at a time; a weight of 0 leaves an input out, one of 2 is the input twice."""
    inputs, weights = random(2, 2500, 40, seed=1), random(2, 2500, seed=2).abs()
    weights[0, :100] = 0
    found = Hessian(40, inputs.device)
    found.add(inputs, weights)
    rows = inputs.view(-1, 40)
    torch.testing.assert_close(found.matrix(), rows.T @ (weights.view(-1, 1) * rows), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_inverse(act_order: bool) -> None:
    h = hessian()
    factor = factorize(h, GPTQOptions(act_order=act_order, damping=0.02))
    order = torch.arange(COLUMNS) if factor.order is None else factor.order
    assert torch.equal(factor.upper, factor.upper.triu())
    assert factor.damping == 0.02
    inverse = torch.linalg.inv(damped(h, 0.02))[order][:, order]
    assert torch.allclose(factor.upper.T @ factor.upper, inverse, rtol=1e-9, atol=0)
    torch.testing.assert_close(factor.damped(), damped(h, 0.02)[order][:, order])
    if act_order:
        assert (h.diagonal()[order].diff() <= 0).all()


def test_a_hessian_that_is_not_positive_definite_is_damped_until_it_is() -> None:
    h = torch.diag(torch.tensor([1.0, -0.05], dtype=torch.float64))
    factor = factorize(h, IN_ORDER)
    assert factor.damping == pytest.approx(1.0)  # -0.05 + 0.1 * 0.475 is still negative
    assert torch.allclose(factor.upper.T @ factor.upper, torch.linalg.inv(damped(h, factor.damping)))


def test_inputs_that_are_zero_leave_rounding_to_nearest() -> None:
    weight = random(ROWS, COLUMNS)
    nearest = quantizer(weight, PerChannel(0))
    rounded, loss = gptq_round(weight, nearest, factorize(torch.zeros(COLUMNS, COLUMNS, dtype=torch.float64), IN_ORDER), IN_ORDER)
    assert torch.equal(rounded, nearest(weight))
    assert loss > 0  # of the damping alone


def test_inputs_that_are_not_finite_are_named() -> None:
    h = hessian()
    h[3, 4] = torch.nan
    with pytest.raises(UserError, match=r"the inputs of layers\.3\.o_proj hold NaN or infinity"):
        factorize(h, IN_ORDER, "layers.3.o_proj")


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(8)], ids=str)
def test_rounding_is_the_definition(granularity: Granularity, symmetric: bool, act_order: bool) -> None:
    options = GPTQOptions(act_order=act_order)
    h, weight = hessian(), random(ROWS, COLUMNS)
    made = quantizer(weight, granularity, symmetric=symmetric)
    factor = factorize(h, options)
    rounded, loss = gptq_round(weight, made, factor, options)
    scale, zero = (of_each_entry(part) for part in (made.scale, made.zero_point))
    order = torch.arange(COLUMNS) if factor.order is None else factor.order
    expected = obq(weight, damped(h, 0.01), scale, zero.round(), order, made.grid.qmin, made.grid.qmax)
    assert torch.allclose(rounded, expected, rtol=0, atol=1e-9)
    assert loss == pytest.approx(error(weight, rounded, damped(h, 0.01)), rel=1e-9)
    assert error(weight, rounded, h) < 0.7 * error(weight, made(weight), h)
    assert torch.equal(made(rounded), rounded)  # on the grid


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_get_their_ranges_when_they_are_reached(symmetric: bool) -> None:
    """The first group keeps its range; later ones cover what the errors before them have made of the weights."""
    options = GPTQOptions(static_groups=False)
    h, weight = hessian(), random(ROWS, COLUMNS)
    before, made = (quantizer(weight, PerGroup(8), symmetric=symmetric) for _ in range(2))
    rounded, _ = gptq_round(weight, made, factorize(h, options), options)
    scale, zero = (of_each_entry(part).clone() for part in (before.scale, before.zero_point))

    def reach(column: int, left: Tensor) -> None:
        if column % 8 == 0 and column > 0:
            group = slice(column, column + 8)
            late = quantizer(left[:, group].contiguous(), PerChannel(0), symmetric=symmetric)
            assert late.scale is not None
            assert late.zero_point is not None
            scale[:, group], zero[:, group] = late.scale[:, None], late.zero_point[:, None]

    grid = made.grid
    expected = obq(weight, damped(h, 0.01), scale, zero, torch.arange(COLUMNS), grid.qmin, grid.qmax, reach)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=1e-9)
    assert before.scale is not None
    assert made.scale is not None
    assert torch.equal(made.scale[:, 0], before.scale[:, 0])
    assert not torch.equal(made.scale, before.scale)
    assert torch.equal(made(rounded), rounded)
    grown = made.scale > before.scale * 1.05
    assert grown[:, 1:].any()
    assert error(weight, rounded, h) < 0.7 * error(weight, before(weight), h)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(8)], ids=str)
def test_every_row_takes_the_range_that_leaves_the_least_loss(granularity: Granularity, act_order: bool, symmetric: bool) -> None:
    """As if the row, or the weight whose rows share a range, had been rounded with each multiple by itself."""
    plain, searching = GPTQOptions(act_order=act_order), GPTQOptions(act_order=act_order, search_ranges=True, candidates=8)
    h, weight = hessian(), random(ROWS, COLUMNS)
    made = quantizer(weight, granularity, symmetric=symmetric)
    assert made.scale is not None
    before = made.scale.clone()
    factor = factorize(h, searching)
    rounded, loss = gptq_round(weight, made, factor, searching)
    multiples = torch.cat([torch.ones(1, dtype=torch.float64), torch.linspace(0.8, 1.2, 8, dtype=torch.float64)])
    chosen = (made.scale / before).reshape(-1, 1) if before.numel() == 1 else (made.scale / before).reshape(ROWS, -1)
    assert torch.allclose(chosen, chosen[:, :1], rtol=1e-6)
    assert torch.equal(made(rounded), rounded)

    found = []
    for multiple in multiples:
        other = quantizer(weight, granularity, symmetric=symmetric)
        other.scale = before * multiple
        tried, _ = gptq_round(weight, other, factor, plain)
        difference = weight - tried
        found.append(((difference @ damped(h, 0.01)) * difference).sum(1))
    losses = torch.stack(found)
    if before.numel() == 1:
        losses = losses.sum(1, keepdim=True)
    assert torch.allclose(chosen[:, 0].double(), multiples[losses.argmin(0)], rtol=1e-6)
    assert loss == pytest.approx(float(losses.min(0).values.sum()), rel=1e-6)
    assert loss < float(losses[0].sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": False}, {"search_ranges": True}], ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(8)], ids=str)
def test_a_descent_ends_where_no_entry_can_do_better(granularity: Granularity, options: dict[str, bool], symmetric: bool) -> None:
    """It starts from GPTQ's result, keeps the ranges, and the loss that is returned is that of what it ends with."""
    plain, descending = GPTQOptions(**options), GPTQOptions(**options, descent_sweeps=100)
    h, weight = hessian(), random(ROWS, COLUMNS)
    other, made = (quantizer(weight, granularity, symmetric=symmetric) for _ in range(2))
    factor = factorize(h, plain)
    _, before = gptq_round(weight, other, factor, plain)
    rounded, loss = gptq_round(weight, made, factor, descending)
    assert other.scale is not None
    assert made.scale is not None
    assert torch.equal(made.scale, other.scale)
    assert torch.equal(made(rounded), rounded)
    assert loss <= before * (1 + 1e-12)
    assert loss == pytest.approx(error(weight, rounded, damped(h, 0.01)), rel=1e-9)
    step = of_each_entry(made.scale)
    for column, by in itertools.product(range(COLUMNS), (-1, 1)):
        moved = rounded.clone()
        moved[:, column] += by * step[:, column]
        moved = made(moved)  # within the grid
        for row in range(ROWS):
            assert error(weight[row], moved[row], damped(h, 0.01)) >= error(weight[row], rounded[row], damped(h, 0.01)) - 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_stay_on_their_grid(dtype: torch.dtype) -> None:
    weight = random(ROWS, COLUMNS).to(dtype)
    made = quantizer(weight, PerChannel(0), method="mse")
    rounded, _ = gptq_round(weight, made, factorize(hessian(), ORDERED), ORDERED)
    assert rounded.dtype == dtype
    assert torch.equal(made(rounded), rounded)


def test_weights_that_read_the_same_inputs_share_a_factor() -> None:
    factor, weight = factorize(hessian(), ORDERED), random(ROWS, COLUMNS)
    made = quantizer(weight, PerTensor())
    whole, loss = gptq_round(weight, made, factor, ORDERED)
    halves = [gptq_round(part.contiguous(), made, factor, ORDERED) for part in weight.split(3)]
    assert torch.equal(whole, torch.cat([part for part, _ in halves]))
    assert loss == pytest.approx(sum(part for _, part in halves))


def test_errors() -> None:
    with pytest.raises(UserError, match="damping = 0"):
        GPTQOptions(damping=0)
    with pytest.raises(UserError, match="act_order = true takes"):
        GPTQOptions(act_order=True, static_groups=False)
    with pytest.raises(UserError, match="search_ranges = true changes"):
        GPTQOptions(search_ranges=True, static_groups=False)
    with pytest.raises(UserError, match="descent_sweeps = -1 is negative"):
        GPTQOptions(descent_sweeps=-1)
    with pytest.raises(UserError, match="candidates = 1: a search needs at least 2"):
        GPTQOptions(candidates=1)
    without = Quantizer(IntegerGrid(4), PerChannel(0), name="w")
    with pytest.raises(UserError, match="no range has been set"):
        gptq_round(torch.ones(2, 2), without, Factor(torch.eye(2), None, 0.1, torch.eye(2)), IN_ORDER)
