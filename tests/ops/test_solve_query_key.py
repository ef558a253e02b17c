"""solve_query_key: optimality, reference, opcheck, edge cases, instruction sets, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from tests.ops.common import assert_same_on_every_isa, random

HEAD_DIM = 16


def moments(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    weight = scale * random(3 * HEAD_DIM, 40, seed=seed) * random(3 * HEAD_DIM, 1, seed=seed + 50).exp()
    return weight, ops.query_key_moments(weight, head_dim=HEAD_DIM)


def loss(key: Tensor, query: Tensor, angle: Tensor, log_scale: Tensor) -> Tensor:
    return ops.lp_norm_query_key(key, angle, log_scale) + ops.lp_norm_query_key(query, angle, log_scale, inverse=True)


def test_nothing_nearby_or_at_random_is_better() -> None:
    (key, key_moments), (query, query_moments) = moments(1), moments(2, 3.0)
    angle, log_scale = ops.solve_query_key(key_moments, query_moments)
    best = loss(key, query, angle, log_scale)
    assert best < loss(key, query, torch.zeros_like(angle), torch.zeros_like(angle))
    for seed in range(20):
        for size in (1e-3, 1e-1, 1.0):
            step = size * random(2, *angle.shape, seed=seed)
            assert loss(key, query, angle + step[0], log_scale + step[1]) >= best * (1 - 1e-12)


def test_gradient_of_the_loss_is_zero() -> None:
    (key, key_moments), (query, query_moments) = moments(3), moments(4)
    angle, log_scale = (t.requires_grad_() for t in ops.solve_query_key(key_moments, query_moments))
    total = loss(key, query, angle, log_scale)
    total.backward()
    assert angle.grad.abs().max() < 1e-10 * total
    assert log_scale.grad.abs().max() < 1e-10 * total
    assert angle.min() >= 0
    assert angle.max() < math.pi / 2


def test_equals_reference() -> None:
    (_, key), (_, query) = moments(5), moments(6)
    for actual, expected in zip(ops.solve_query_key(key, query), reference.solve_query_key(key, query), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_opcheck() -> None:
    (_, key), (_, query) = moments(5), moments(6)
    torch.library.opcheck(torch.ops.fptquant.solve_query_key.default, (key, query))


def test_zero_pairs_are_left_alone() -> None:
    (_, key), (_, query) = moments(7), moments(8)
    key[0, 1], query[1, 2] = 0, 0
    for angle, log_scale in (ops.solve_query_key(key, query), reference.solve_query_key(key, query)):
        for pair in ((0, 1), (1, 2)):
            assert angle[pair] == log_scale[pair] == 0
        assert (log_scale != 0).sum() == log_scale.numel() - 2


def test_extreme_magnitudes() -> None:
    (_, key), (_, query) = moments(9), moments(10)
    angle, log_scale = ops.solve_query_key(key, query)
    far_angle, far_log_scale = ops.solve_query_key(key * 1e-160, query * 1e160)
    torch.testing.assert_close(far_angle, angle, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(far_log_scale, log_scale + 40 * math.log(10), rtol=1e-9, atol=1e-9)
    assert ops.solve_query_key(torch.zeros(0, 4, 5), torch.zeros(0, 4, 5))[0].shape == (0, 4)


def test_instruction_sets_and_threads_bit_for_bit() -> None:
    (_, key), (_, query) = moments(11), moments(12)
    assert_same_on_every_isa(lambda: ops.solve_query_key(key, query))


def test_errors() -> None:
    with pytest.raises(UserError, match=r"key_moments \[2, 5\] and query_moments \[3, 5\]"):
        ops.solve_query_key(torch.zeros(2, 5), torch.zeros(3, 5))
    with pytest.raises(RuntimeError, match=r"must be \[..., 5\] float64"):
        torch.ops.fptquant.solve_query_key(torch.zeros(2, 5), torch.zeros(2, 5))
