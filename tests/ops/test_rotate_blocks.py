"""rotate_blocks: permuted channels times a matrix for each block; reference, inverse, gradient, instruction sets, errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from fptquant.transforms.base import generator, random_orthogonal
from tests.ops.common import DTYPES, assert_no_growth, assert_same_on_every_isa, assert_within, random
from tests.tolerances import compute_dtype

SIZES = [(1, 1), (3, 5), (4, 8), (2, 17), (6, 96), (12, 128)]
ROWS = 70


def parts(sizes: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    blocks, size = sizes
    rng = generator(3)
    matrices = torch.stack([random_orthogonal(size, rng) for _ in range(blocks)]).to(compute_dtype(dtype))
    return matrices, torch.randperm(blocks * size, generator=rng)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype: torch.dtype, sizes: tuple[int, int], permuted: bool, transpose: bool) -> None:
    (matrices, permutation), channels = parts(sizes, dtype), sizes[0] * sizes[1]
    x, dy = (random(ROWS, channels, dtype=dtype, seed=seed) for seed in (0, 5))
    order = permutation if permuted else torch.empty(0, dtype=torch.int64)
    leaf = x.clone().requires_grad_()
    actual = ops.rotate_blocks(leaf, matrices, permutation if permuted else None, transpose=transpose)
    actual.backward(dy)
    assert_within("rotate_blocks", actual, reference.rotate_blocks(x, matrices, order, transpose), dtype)
    assert_within("rotate_blocks", leaf.grad, reference.rotate_blocks(dy, matrices, order, not transpose), dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_a_matrix_and_orthogonal_ones_are_undone(sizes: tuple[int, int]) -> None:
    matrices, permutation = parts(sizes, torch.float64)
    channels = sizes[0] * sizes[1]
    x = random(2, 3, channels)
    whole = torch.block_diag(*matrices) @ torch.eye(channels, dtype=torch.float64)[permutation]
    y = ops.rotate_blocks(x, matrices, permutation)
    torch.testing.assert_close(y, x @ whole.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.rotate_blocks(y, matrices, permutation, transpose=True), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transpose", [False, True])
def test_gradient(transpose: bool) -> None:
    matrices, permutation = parts((3, 5), torch.float64)
    matrices = matrices + 0.1 * random(3, 5, 5)  # not orthogonal: the gradient must be that of any matrices
    x = random(2, 15).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.rotate_blocks(x, matrices, permutation, transpose=transpose), (x,))


def test_opcheck() -> None:
    matrices, permutation = parts((3, 5), torch.float32)
    x = random(4, 15, dtype=torch.float32).requires_grad_()
    for order in (permutation, permutation[:0]):
        torch.library.opcheck(torch.ops.fptquant.rotate_blocks.default, (x, matrices, order, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_and_instruction_set_bit_for_bit(dtype: torch.dtype) -> None:
    for sizes in SIZES[:-1]:
        matrices, permutation = parts(sizes, dtype)
        x = random(ROWS, sizes[0] * sizes[1], dtype=dtype)

        def call(x: Tensor = x, matrices: Tensor = matrices, permutation: Tensor = permutation) -> tuple[Tensor, ...]:
            return tuple(ops.rotate_blocks(x, matrices, permutation, transpose=transpose) for transpose in (False, True))

        assert_same_on_every_isa(call)


def test_errors() -> None:
    matrices, x = torch.zeros(2, 3, 3), torch.zeros(4, 6)
    with pytest.raises(UserError, match=r"matrices have shape \[2, 3\]"):
        ops.rotate_blocks(x, torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"x has shape \[4, 5\], but the matrices have 6 channels"):
        ops.rotate_blocks(x[:, :5], matrices)
    with pytest.raises(UserError, match=r"permutation has shape \[5\]; it must be int64 \[6\]"):
        ops.rotate_blocks(x, matrices, torch.arange(5))
    with pytest.raises(RuntimeError, match=r"permutation\[1\] = 0 is outside of 0 \.\. 5 or stands there twice"):
        ops.rotate_blocks(x, matrices, torch.tensor([0, 0, 1, 2, 3, 4]))
    with pytest.raises(RuntimeError, match=r"permutation\[5\] = 6"):
        ops.rotate_blocks(x, matrices, torch.tensor([0, 1, 2, 3, 4, 6]))
    assert ops.rotate_blocks(torch.zeros(0, 6), matrices).shape == (0, 6)


def test_a_failing_call_leaks_nothing() -> None:
    x, matrices, order = torch.zeros(1024, 1024), torch.zeros(32, 32, 32), torch.zeros(1024, dtype=torch.int64)
    assert_no_growth(lambda: torch.ops.fptquant.rotate_blocks(x, matrices, order, False), "stands there twice")
