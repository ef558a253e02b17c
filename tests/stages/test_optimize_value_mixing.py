"""The optimizer of T_v: known minima, gradients, monotone, deterministic, well conditioned, odd weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.stages.optimize_value_mixing import (
    _curvature,
    _evaluate,
    _gradient,
    balanced_factorization,
    optimize_value_mixing,
    value_mixing_loss,
)
from fptquant.transforms.base import generator, random_orthogonal

HEADS, DIM = 3, 8


def weights(dtype: torch.dtype = torch.float64, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random values [3, 8, 40] and outputs [3, 60, 8] whose dimensions are correlated and heavy-tailed."""
    rng = generator(seed)
    values = torch.randn(HEADS, DIM, 40, generator=rng, dtype=torch.float64) ** 3
    mixing = torch.randn(HEADS, DIM, DIM, generator=rng, dtype=torch.float64)
    outputs = torch.randn(HEADS, 60, DIM, generator=rng, dtype=torch.float64) @ mixing
    return (mixing @ values).to(dtype), outputs.to(dtype)


def hadamard(dtype: torch.dtype = torch.float64) -> Tensor:
    matrix: Tensor = (ops.hadamard_matrix(DIM) / DIM**0.5).to(dtype)
    return matrix.expand(HEADS, DIM, DIM).clone()


def test_gradient_and_curvature_are_those_of_the_objective() -> None:
    values, outputs = weights()
    point = _evaluate(hadamard(), values, outputs)

    def of_step(step: Tensor) -> Tensor:
        matrix = torch.eye(DIM, dtype=torch.float64) + step
        merged = matrix @ point.y[0], torch.linalg.solve(matrix, point.z[0], left=False)
        value: Tensor = merged[0].pow(4).sum() + merged[1].pow(4).sum()
        return value

    zero = torch.zeros(DIM, DIM, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(of_step(zero), zero)
    torch.testing.assert_close(gradient, _gradient(point)[0], rtol=1e-10, atol=1e-8)
    hessian = torch.autograd.functional.hessian(of_step, zero.detach())  # type: ignore[no-untyped-call]
    second, cross = _curvature(point)
    for i, j in ((1, 4), (6, 2), (0, 7)):
        torch.testing.assert_close(hessian[i, j, i, j], second[0, i, j], rtol=1e-10, atol=1e-8)
        torch.testing.assert_close(hessian[i, j, j, i], cross[0, i, j], rtol=1e-10, atol=1e-8)


def test_balanced_factorization_diagonalizes_both_grams() -> None:
    values, outputs = weights()
    matrix = balanced_factorization(values, outputs)
    inverse = torch.linalg.inv(matrix)
    left = matrix @ values @ values.mT @ matrix.mT
    right = inverse.mT @ outputs.mT @ outputs @ inverse
    scale = float(left.abs().max())
    assert float((left - right).abs().max()) < 1e-9 * scale
    off_diagonal = left - torch.diag_embed(torch.diagonal(left, dim1=-2, dim2=-1))
    assert float(off_diagonal.abs().max()) < 1e-9 * scale


def test_a_known_minimum_is_found() -> None:
    """Values of +-1 and outputs of +-1 have the least fourth powers for their lengths, so mixing must find them again."""
    rng = generator(1)
    hidden = ops.hadamard_matrix(64)[1 : DIM + 1].expand(HEADS, DIM, 64)
    rotation = torch.stack([random_orthogonal(DIM, rng) for _ in range(HEADS)])
    values, outputs = rotation @ hidden, hidden.mT @ rotation.mT
    result = optimize_value_mixing(hadamard(), values, outputs, steps=300, tolerance=1e-12)
    least = 2 * DIM * 64
    assert float(result.loss_after.min()) >= least * (1 - 1e-9)
    assert float(result.loss_before.min()) > 1.2 * least
    torch.testing.assert_close(result.loss_after, torch.full((HEADS,), float(least), dtype=torch.float64), rtol=0.08, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_steps_never_harm_and_the_minimum_is_stationary(dtype: torch.dtype) -> None:
    values, outputs = weights(dtype)
    losses = []
    for steps in (0, 1, 3, 10, 200):
        result = optimize_value_mixing(hadamard(dtype), values, outputs, steps=steps, tolerance=1e-9)
        torch.testing.assert_close(
            value_mixing_loss(result.matrix.double(), values.double(), outputs.double()), result.loss_after, rtol=1e-4, atol=0
        )
        losses.append(float(result.loss_after.sum()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
    last = _evaluate(result.matrix.double(), values.double(), outputs.double())
    assert float(_gradient(last).abs().amax() / last.value.max()) < 0.02


def test_orthogonal_stays_orthogonal() -> None:
    values, outputs = weights()
    result = optimize_value_mixing(hadamard(), values, outputs, constraint="orthogonal", steps=60)
    eye = torch.eye(DIM, dtype=torch.float64)
    assert float((result.matrix @ result.matrix.mT - eye).abs().max()) < 1e-12
    assert bool((result.loss_after < result.loss_before).all())
    free = optimize_value_mixing(hadamard(), values, outputs, steps=60)
    assert bool((free.loss_after < result.loss_after).all())


def test_it_is_deterministic_and_heads_are_independent() -> None:
    values, outputs = weights(torch.float32)
    first = optimize_value_mixing(hadamard(torch.float32), values, outputs, steps=20, tolerance=0.0)
    again = optimize_value_mixing(hadamard(torch.float32), values, outputs, steps=20, tolerance=0.0)
    assert torch.equal(first.matrix, again.matrix)
    alone = optimize_value_mixing(hadamard(torch.float32)[1:2], values[1:2], outputs[1:2], steps=20, tolerance=0.0)
    torch.testing.assert_close(alone.loss_after, first.loss_after[1:2], rtol=1e-3, atol=0)


def test_the_scale_of_a_head_does_not_matter() -> None:
    values, outputs = weights()
    plain = optimize_value_mixing(hadamard(), values, outputs, steps=15)
    scaled = optimize_value_mixing(hadamard(), 1e-3 * values, 1e3 * outputs, steps=15)
    torch.testing.assert_close(scaled.loss_after, plain.loss_after, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pruned", ["value", "output", "both", "everything"])
def test_pruned_dimensions_stay_invertible(pruned: str) -> None:
    values, outputs = weights(torch.float32)
    if pruned in ("value", "both"):
        values[0, 3] = 0
    if pruned in ("output", "both"):
        outputs[0, :, 3] = 0
    if pruned == "everything":
        values[0], outputs[0] = 0, 0
    result = optimize_value_mixing(hadamard(torch.float32), values, outputs, steps=20)
    assert bool(torch.isfinite(result.matrix).all())
    assert bool((result.loss_after <= result.loss_before).all())
    before = outputs.double() @ values.double()
    merged = torch.linalg.solve(result.matrix.double(), outputs.double(), left=False) @ (result.matrix.double() @ values.double())
    assert float((merged - before).abs().max()) < 1e-6 * float(before.abs().max())
    assert float(torch.linalg.cond(result.matrix.double()).max()) < 1e4
