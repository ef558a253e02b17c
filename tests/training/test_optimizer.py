"""The optimizer: its schedule and formula in numbers, clipping, and gradients that are not finite."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from fptquant.config.training import LearningRates, TrainingConfig
from fptquant.errors import UserError
from fptquant.training.optimizer import GroupedAdamW, learning_rate_factor


def settings(**options: object) -> TrainingConfig:
    rates = {"value_mixing": 0.1, "weight_range": 0.01}
    return TrainingConfig.model_validate({"steps": 4, "warmup": 0.0, "clip_norm": None, "lr": rates, **options})


def two_groups(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=dtype)), nn.Parameter(torch.tensor([[4.0]], dtype=dtype))


def optimizer_of(first: nn.Parameter, second: nn.Parameter, options: TrainingConfig) -> GroupedAdamW:
    return GroupedAdamW({"value_mixing": [("a", first)], "weight_range": [("b", second)]}, options)


def test_the_schedule_rises_and_falls() -> None:
    factors = [learning_rate_factor(step, 101, warmup=0.1, final=0.2) for step in range(101)]
    assert factors[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert factors[10] == 1
    assert factors[55] == pytest.approx(0.6)
    assert factors[100] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))
    assert [learning_rate_factor(0, 1, warmup=warmup, final=0.1) for warmup in (0.0, 0.9)] == [1, 1]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_steps_follow_the_formula(clip_norm: float | None) -> None:
    options = settings(clip_norm=clip_norm, beta1=0.8, beta2=0.95)
    first, second = two_groups()
    optimizer = optimizer_of(first, second, options)
    values = [first.detach().clone(), second.detach().clone()]
    means = [torch.zeros_like(value) for value in values]
    squares = [torch.zeros_like(value) for value in values]
    for step in range(4):
        gradients = [values[0] * (step + 1), values[1].sin()]
        first.grad, second.grad = gradients[0].clone(), gradients[1].clone()
        norms = optimizer.gradient_norms()
        assert list(norms.values()) == pytest.approx([float(gradient.norm()) for gradient in gradients], rel=1e-6)
        norm = math.hypot(*norms.values())
        optimizer.apply_(step, norm)
        assert first.grad is None
        for index, peak in enumerate((0.1, 0.01)):
            gradient = gradients[index] * (1 if clip_norm is None else min(1, clip_norm / norm))
            means[index] = 0.8 * means[index] + 0.2 * gradient
            squares[index] = 0.95 * squares[index] + 0.05 * gradient**2
            mean, square = means[index] / (1 - 0.8 ** (step + 1)), squares[index] / (1 - 0.95 ** (step + 1))
            rate = peak * learning_rate_factor(step, 4, warmup=0.0, final=0.1)
            values[index] = values[index] - rate * mean / (square.sqrt() + 1e-8)
        torch.testing.assert_close(first.detach(), values[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(second.detach(), values[1], rtol=1e-12, atol=0)


def test_state_and_gradients_come_back_bit_for_bit() -> None:
    first, second = two_groups(torch.float32)
    optimizer = optimizer_of(first, second, settings())
    for step in range(2):
        first.grad, second.grad = first.detach() ** 3, second.detach().cos()
        optimizer.apply_(step, 1.0)
    second.grad = torch.full_like(second, 0.3)
    other = [nn.Parameter(value.detach().clone()) for value in (first, second)]
    twin = optimizer_of(*other, settings())
    twin.load_(optimizer.state(), optimizer.gradients())
    assert twin.gradients().keys() == {"b"}
    for step in (2, 3):
        for parameter in (first, second, *other):
            if parameter.grad is None:
                parameter.grad = parameter.detach() / 3
        for one in (optimizer, twin):
            one.apply_(step, 1.0)
    assert torch.equal(first, other[0])
    assert torch.equal(second, other[1])


def test_a_norm_that_overflows_is_measured_and_a_gradient_that_is_not_finite_is_named() -> None:
    first, second = two_groups(torch.float32)
    optimizer = optimizer_of(first, second, settings(clip_norm=1.0))
    first.grad, second.grad = torch.full((3,), 1e30), torch.zeros(1, 1)
    norms = optimizer.gradient_norms()
    assert norms["value_mixing"] == pytest.approx(math.sqrt(3) * 1e30)
    assert optimizer.nonfinite_gradient() is None
    second.grad[0, 0] = math.nan
    assert math.isnan(optimizer.gradient_norms()["weight_range"])
    assert optimizer.nonfinite_gradient() == "b"
    first.grad[1] = math.inf
    assert optimizer.nonfinite_gradient() == "a"


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is trained"):
        GroupedAdamW({"value_mixing": []}, settings())
    first, second = two_groups()
    options = settings().model_copy(update={"lr": LearningRates(value_mixing=0.1, weight_range=None)})
    with pytest.raises(UserError, match=r"training\.lr\.weight_range is null"):
        optimizer_of(first, second, options)
