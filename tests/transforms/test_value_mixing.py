"""T_v: inverse undoes it, it cannot become singular, starts are what they are called, merged is online."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms import Start, ValueMixing
from fptquant.transforms.base import generator
from fptquant.transforms.value_mixing import CONDITION_LIMIT, Constraint, hold_mixings, release_mixings

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 12


@pytest.mark.parametrize("start", get_args(Start))
@pytest.mark.parametrize("constraint", ["none", "orthogonal"])
def test_starts_are_orthogonal_and_seeded(start: Start, constraint: Constraint) -> None:
    transform = ValueMixing(KV_HEADS, HEAD_DIM, start=start, constraint=constraint, seed=5)
    matrix = transform.matrix().detach()
    eye = torch.eye(HEAD_DIM, dtype=torch.float64).expand(KV_HEADS, -1, -1)
    torch.testing.assert_close(matrix @ matrix.mT, eye, rtol=0, atol=1e-13)
    assert torch.equal(matrix, ValueMixing(KV_HEADS, HEAD_DIM, start=start, seed=5).matrix())
    if start == "identity":
        assert torch.equal(matrix, eye)
    if "hadamard" in start:
        assert float((matrix.abs() - HEAD_DIM**-0.5).abs().max()) < 1e-14
    if start == "hadamard":
        torch.testing.assert_close(matrix[1] * HEAD_DIM**0.5, ops.hadamard_matrix(HEAD_DIM))
    if start.startswith("random"):
        assert not torch.equal(matrix[0], matrix[1])
        assert not torch.equal(matrix, ValueMixing(KV_HEADS, HEAD_DIM, start=start, seed=6).matrix())


@pytest.mark.parametrize(("constraint", "start"), [("none", "hadamard"), ("orthogonal", "hadamard"), ("diagonal", "identity")])
def test_inverse_and_merging(constraint: Constraint, start: Start) -> None:
    rng = generator(3)
    transform = ValueMixing(KV_HEADS, HEAD_DIM, start=start, constraint=constraint).requires_grad_(False)
    transform.randomize_(rng)
    values = torch.randn(4, KV_HEADS * HEAD_DIM, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(transform.inverse(transform(values)), values, rtol=0, atol=1e-13)
    weight = torch.randn(KV_HEADS * HEAD_DIM, 7, generator=rng, dtype=torch.float64)
    bias, x = torch.randn(KV_HEADS * HEAD_DIM, generator=rng).double(), torch.randn(4, 7, generator=rng, dtype=torch.float64)
    merged = torch.nn.functional.linear(x, transform.merge_into(weight, "value"), transform.merge_into(bias, "value"))
    torch.testing.assert_close(merged, transform(torch.nn.functional.linear(x, weight, bias)), rtol=0, atol=1e-12)
    output = torch.randn(5, HEADS * HEAD_DIM, generator=rng, dtype=torch.float64)
    attended = torch.randn(4, HEADS * HEAD_DIM, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        attended @ transform.merge_into(output, "output").T, transform.inverse(attended) @ output.T, rtol=0, atol=1e-12
    )


def test_no_parameter_makes_it_singular() -> None:
    transform = ValueMixing(1, 4, start="identity").requires_grad_(False)
    transform.log_mixing.copy_(-0.5 * torch.ones(4, 4))
    assert float(torch.linalg.det(transform.matrix())) == pytest.approx(torch.tensor(-2.0).exp().item(), rel=1e-6)
    for size in (10.0, 1e4, 1e15):
        transform.log_mixing.copy_(size * torch.randn(4, 4, generator=generator(3)))
        assert 2 < float(transform.condition_numbers()) <= CONDITION_LIMIT * (1 + 1e-9)
    orthogonal = ValueMixing(1, 4, constraint="orthogonal").requires_grad_(False)
    orthogonal.log_mixing.copy_(100 * torch.randn(4, 4, generator=generator(0)))
    assert float(orthogonal.condition_numbers()) == pytest.approx(1.0, abs=1e-9)


def test_set_matrix_and_gradient() -> None:
    transform = ValueMixing(KV_HEADS, HEAD_DIM)
    transform.randomize_(generator(1))
    matrix = torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM, generator=generator(2), dtype=torch.float64)
    transform.set_matrix_(matrix)
    torch.testing.assert_close(transform.matrix().detach(), matrix, rtol=0, atol=1e-14)
    transform.matrix().sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.ones(HEAD_DIM, HEAD_DIM, dtype=torch.float64) @ matrix.mT
    torch.testing.assert_close(transform.log_mixing.grad, expected.float())


def test_errors() -> None:
    with pytest.raises(UserError, match=r"10.*identity or random_orthogonal"):
        ValueMixing(1, 10)
    assert ValueMixing(1, 10, start="random_orthogonal").describe()["largest_condition_number"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="constraint 'triangular' is not known"):
        ValueMixing(1, 4, constraint="triangular")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="start 'hadamrd' is not known"):
        ValueMixing(1, 4, start="hadamrd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not fit 20 features"):
        ValueMixing(2, 4).merge_into(torch.zeros(5, 20), "output")
    with pytest.raises(UserError, match=r"shape \[2, 4, 4\], not \[4, 4\]"):
        ValueMixing(2, 4).set_matrix_(torch.eye(4))


def test_held_matrices_are_those_of_each_transform() -> None:
    mixings = [ValueMixing(heads, 4, seed=heads, constraint=c) for heads, c in ((1, "none"), (3, "orthogonal"))]
    for mixing in mixings:
        mixing.randomize_(generator(4))
    expected = [mixing.matrix() for mixing in mixings]
    hold_mixings(mixings)
    held = [mixing.matrix() for mixing in mixings]
    torch.testing.assert_close(held, expected, rtol=1e-12, atol=1e-12)
    sum(matrix.square().sum() for matrix in held).backward()  # type: ignore[union-attr]
    gradients = [mixing.log_mixing.grad for mixing in mixings]
    release_mixings(mixings)
    for mixing, gradient in zip(mixings, gradients, strict=True):
        mixing.zero_grad()
        mixing.matrix().square().sum().backward()  # type: ignore[no-untyped-call]
        torch.testing.assert_close(gradient, mixing.log_mixing.grad)


def test_merging_for_training_agrees_with_merging() -> None:
    transform = ValueMixing(KV_HEADS, HEAD_DIM)
    transform.randomize_(generator(5))
    rng = generator(6)
    value, output = torch.randn(KV_HEADS * HEAD_DIM, 5, generator=rng), torch.randn(5, HEADS * HEAD_DIM, generator=rng)
    for weight, side in ((value, "value"), (output, "output")):
        torch.testing.assert_close(transform.merge(weight, side), transform.merge_into(weight, side), rtol=1e-5, atol=1e-5)


def test_diagonal_matrices_stay_diagonal() -> None:
    mixing = ValueMixing(2, 6, start="identity", constraint="diagonal")
    mixing.randomize_(torch.Generator().manual_seed(4), spread=2.0)
    matrix = mixing.matrix().detach()
    assert torch.equal(matrix, torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1)))
    assert float((matrix.diagonal(dim1=-2, dim2=-1) - 1).abs().max()) > 0.1
    with pytest.raises(UserError, match=r"starts as hadamard is not diagonal; set transforms\.value_mixing\.start=identity"):
        ValueMixing(2, 8, start="hadamard", constraint="diagonal")
