"""AutoRound of one weight: the formula and its gradients, the start, the steps, and what a quantizer makes of the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.quantizers.autoround import LEAST_RATIO, LearnedRounding
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel, PerGroup, PerTensor
from fptquant.quantizers.quantizer import Quantizer
from fptquant.quantizers.ranges import RangeMethod
from tests.ops.common import random
from tests.quantizers.signround import signround

ROWS, COLUMNS = 6, 24
GRANULARITIES = [PerTensor(), PerChannel(0), PerGroup(8)]


def quantizer(weight: Tensor, granularity: Granularity, *, symmetric: bool = True, method: str = "mse") -> Quantizer:
    """At 3 bits, with a range that clips some weights."""
    made = Quantizer(IntegerGrid(3, symmetric), granularity, range_method=RangeMethod(method), name="w")  # type: ignore[arg-type]
    made.set_range_from(weight)
    made.mode = "on"
    return made


def draw_(rounding: LearnedRounding) -> None:
    """Random offsets and ratios."""
    rounding.offset.copy_(random(*rounding.offset.shape, seed=2).clamp(-1, 1) / 2)
    rounding.ratios.copy_(0.5 + 0.5 * random(*rounding.ratios.shape, seed=3).sigmoid())


def of_each_entry(part: Tensor) -> Tensor:
    """A value for each channel of any granularity, as [ROWS, COLUMNS]."""
    flat = part.reshape(-1)
    return flat.repeat_interleave(ROWS * COLUMNS // len(flat)).reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_it_is_the_formula_and_its_gradients(granularity: Granularity, symmetric: bool) -> None:
    weight, dy = random(ROWS, COLUMNS), random(ROWS, COLUMNS, seed=4)
    made = quantizer(weight, granularity, symmetric=symmetric)
    rounding = LearnedRounding(weight, made)
    draw_(rounding)
    rounding.require_gradients_(True)
    found = rounding.quantized()
    found.backward(dy)

    assert made.scale is not None
    assert made.zero_point is not None
    low, high = (of_each_entry((edge - made.zero_point) * made.scale) for edge in (made.grid.qmin, made.grid.qmax))
    offset = rounding.offset.detach().reshape(ROWS, COLUMNS).clone().requires_grad_()
    ratios = rounding.ratios.detach().clone().requires_grad_()
    upper, lower = of_each_entry(ratios[0]), of_each_entry(ratios[-1])
    expected = signround(weight, low, high, offset, upper, lower, made.grid)
    expected.backward(dy)

    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.allclose(rounding.offset.grad.reshape(ROWS, COLUMNS), offset.grad, rtol=1e-12, atol=0)
    assert torch.allclose(rounding.ratios.grad, ratios.grad, rtol=1e-9, atol=1e-12)
    clipped = offset.grad == 0
    assert 0.02 < float(clipped.double().mean()) < 0.5, "neither all nor nothing is clipped"
    assert bool((ratios.grad != 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_it_starts_with_rounding_to_nearest_and_a_quantizer_leaves_its_result_alone(
    granularity: Granularity, symmetric: bool, dtype: torch.dtype
) -> None:
    weight = random(ROWS, COLUMNS).to(dtype)
    made = quantizer(weight, granularity, symmetric=symmetric)
    rounding = LearnedRounding(weight, made)
    start, scale, zero = rounding.result()
    assert torch.equal(start, made(weight))
    assert torch.equal(scale, made.scale)
    assert zero is None if symmetric else torch.equal(zero, made.zero_point)
    draw_(rounding)
    rounded, made.scale, zero = rounding.result()
    made.zero_point = made.zero_point if zero is None else zero
    assert (rounded.dtype, made.scale.shape) == (dtype, scale.shape)
    assert torch.equal(made(rounded), rounded)
    assert not torch.equal(rounded, start)
    if zero is not None:
        assert torch.equal(zero, zero.round())


def test_steps_go_against_the_sign_and_stay_within_their_bounds() -> None:
    weight = random(ROWS, COLUMNS)
    rounding = LearnedRounding(weight, quantizer(weight, PerChannel(0), symmetric=False))
    gradient, ratio_gradient = random(ROWS, COLUMNS, seed=6), random(2, ROWS, seed=7)
    gradient[0] = 0

    def step(rate: float) -> None:
        rounding.require_gradients_(True)
        rounding.offset.grad, rounding.ratios.grad = gradient.clone(), ratio_gradient.clone()
        rounding.step_(rate)

    step(0.1)
    assert torch.equal(rounding.offset, -0.1 * gradient.sign())
    assert torch.equal(rounding.ratios, (1 - 0.1 * ratio_gradient.sign()).clamp(max=1))
    assert rounding.offset.grad is None
    step(7.0)
    assert torch.equal(rounding.offset, -0.5 * gradient.sign())
    assert torch.equal(rounding.ratios, (1 - 7 * ratio_gradient.sign()).clamp(LEAST_RATIO, 1))


@pytest.mark.parametrize("learn_clipping", [True, False])
def test_the_best_state_is_remembered(learn_clipping: bool) -> None:
    weight = random(ROWS, COLUMNS)
    made = quantizer(weight, PerGroup(8))
    rounding = LearnedRounding(weight, made, learn_clipping=learn_clipping)

    def step() -> Tensor:
        rounding.require_gradients_(True)
        rounding.quantized().backward(random(ROWS, COLUMNS, seed=8))
        rounding.step_(0.3)
        rounding.require_gradients_(False)
        return rounding.result()[0]

    start, best = rounding.result()[0], step()
    rounding.keep_()
    assert not torch.equal(step(), best)
    rounding.restore_()
    assert torch.equal(rounding.result()[0], best)
    assert torch.equal(rounding.ratios, torch.ones_like(rounding.ratios)) is not learn_clipping
    rounding.restart_()
    assert torch.equal(rounding.result()[0], start)


def test_a_zero_point_outside_of_the_grid_leaves_a_positive_scale() -> None:
    """Training moves zero points as real numbers."""
    weight = random(ROWS, COLUMNS)
    made = quantizer(weight, PerChannel(0), symmetric=False)
    assert made.zero_point is not None
    made.zero_point.fill_(-1.0)
    rounding = LearnedRounding(weight, made)
    rounding.ratios[0].fill_(LEAST_RATIO)
    assert torch.equal(rounding.qparams()[0], LEAST_RATIO * rounding.scale)


def test_a_quantizer_without_range_is_refused() -> None:
    with pytest.raises(UserError, match="no range has been set"):
        LearnedRounding(torch.ones(2, 2), Quantizer(IntegerGrid(4), PerChannel(0), name="w"))
