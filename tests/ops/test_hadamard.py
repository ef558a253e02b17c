"""hadamard: construction, reference, gradient, opcheck, edge cases, instruction sets, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fptquant.numpy as fnp
from fptquant import ops
from fptquant.errors import UserError
from fptquant.ops import reference
from fptquant.ops._hadamard_factors import hadamard_factors
from tests.ops.common import DTYPES, assert_no_growth, assert_same_on_every_isa, assert_within, random
from tests.tolerances import UNIT, compute_dtype

ORDERS = [1, 2, 12, 20, 28, 36, 40, 44, 52, 60, 76, 92, 100, 108, 116, 148, 156, 164, 172, 244]
MODEL_SIZES = [576, 1536, 11008, 13824, 14336, 18944, 27648, 29568]


def additions(size: int) -> int:
    return sum(factor.shape[0] for factor in hadamard_factors(size))


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal(order: int) -> None:
    matrix = ops.hadamard_matrix(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


def test_paley_matrices_are_built_over_prime_powers() -> None:
    """28 = 27 + 1 (Paley I over GF(27)), 52 = 2 (25 + 1) and 100 = 2 (49 + 1) (Paley II over GF(25) and GF(49))."""
    for order in (28, 52, 100, 244):
        assert [factor.shape[0] for factor in hadamard_factors(order)] == [order]


def test_sizes() -> None:
    sizes = set(ops.hadamard_sizes(1024))
    assert {2**k for k in range(11)} <= sizes
    assert set(ORDERS) <= sizes
    assert not sizes & {3, 5, 6, 7, 9, 10, 14, 18, 22, 188, 236}
    assert all(size in (1, 2) or size % 4 == 0 for size in sizes)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_matrix(dtype: torch.dtype, transpose: bool) -> None:
    for size in (1, 2, 4, 8, 12, 16, 24, 64, 96, 144, 156, 240):
        x = random(5, 2 * size, dtype=dtype)
        matrix = ops.hadamard_matrix(size).to(torch.float64)
        matrix = matrix.t() if transpose else matrix
        expected = (x.double().reshape(-1, size) @ matrix.t() / math.sqrt(size)).reshape(x.shape).to(dtype)
        factor = additions(size) * math.sqrt(size) + 2 * UNIT[dtype] / UNIT[compute_dtype(dtype)]
        actual = ops.hadamard(x, block_size=size, transpose=transpose)
        assert_within("hadamard", actual, expected, dtype, factor)


@pytest.mark.parametrize("size", MODEL_SIZES)
def test_sizes_of_models_against_reference(size: int) -> None:
    for dtype in (torch.float32, torch.float64):
        x = random(2, size, dtype=dtype)
        for transpose in (False, True):
            expected = reference.hadamard(x, size, transpose)
            actual = ops.hadamard(x, transpose=transpose)
            assert_within("hadamard", actual, expected, dtype, 2 * additions(size) * math.sqrt(size))
            # Far below that bound in practice: errors add up like a random walk.
            assert (actual - expected).abs().max() < 64 * torch.finfo(dtype).eps


def test_error_is_at_most_twice_that_of_the_matrix_product() -> None:
    for size in (128, 576, 1536):
        x = random(64, size)
        matrix = ops.hadamard_matrix(size) / math.sqrt(size)
        exact = x @ matrix.t()
        x32, m32 = x.float(), matrix.float()
        assert (ops.hadamard(x32) - exact).norm() < 2 * (x32 @ m32.t() - exact).norm()


@pytest.mark.parametrize("transpose", [False, True])
def test_gradient(transpose: bool) -> None:
    x = random(2, 24).requires_grad_()
    for block in (1, 8, 12, 24):
        assert torch.autograd.gradcheck(lambda x, b=block: ops.hadamard(x, block_size=b, transpose=transpose), (x,))
    assert torch.autograd.gradgradcheck(lambda x: ops.hadamard(x, block_size=12, transpose=transpose), (x,))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fptquant.hadamard.default, (random(3, 24, dtype=torch.float32).requires_grad_(), 12, True))


def test_edges() -> None:
    assert ops.hadamard(torch.empty(0, 12)).shape == (0, 12)
    assert torch.equal(ops.hadamard(torch.tensor([3.0])), torch.tensor([3.0]))
    x = random(3, 4, 12)
    assert torch.equal(ops.hadamard(x.transpose(0, 1)), ops.hadamard(x).transpose(0, 1))
    x[0, 0, 5], x[1, 2, 0] = math.nan, math.inf
    y = ops.hadamard(x)
    assert y[0, 0].isnan().all()
    assert y[1, 2].isinf().all()
    assert y[2].isfinite().all()
    tiny = torch.full((8,), 1e-42)
    assert ops.hadamard(tiny)[0].item() == pytest.approx(8**0.5 * 1e-42, rel=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets_and_threads_bit_for_bit(dtype: torch.dtype) -> None:
    for size in (1, 2, 4, 8, 12, 16, 20, 32, 64, 96, 172, 576, 1536, 29568):
        x = random(37, size, dtype=dtype) if size < 10000 else random(2, size, dtype=dtype)
        x[0, size // 2] = math.nan
        for transpose in (False, True):
            assert_same_on_every_isa(lambda x=x, t=transpose: ops.hadamard(x, transpose=t))


def test_compiles_without_a_graph_break() -> None:
    x = random(3, 24)
    compiled = torch.compile(lambda x: ops.hadamard(x * 2, block_size=8), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.hadamard(x * 2, block_size=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_numpy_twin(dtype: torch.dtype) -> None:
    x = random(3, 40, dtype=dtype)
    for options in ({}, {"block_size": 20}, {"block_size": 20, "transpose": True}):
        assert np.array_equal(fnp.hadamard(x.numpy(), **options), ops.hadamard(x, **options).numpy())
    assert np.array_equal(fnp.hadamard(x.numpy()[:, ::2]), ops.hadamard(x[:, ::2]).numpy())
    with pytest.raises(UserError, match="no Hadamard matrix of size 7 "):
        fnp.hadamard(np.zeros((2, 7)))
    with pytest.raises(UserError, match="block_size = 3 does not divide"):
        fnp.hadamard(np.zeros((2, 8)), block_size=3)
    with pytest.raises(UserError, match="dtype int64"):
        fnp.hadamard(np.zeros((2, 8), np.int64))


def test_errors_name_possible_sizes() -> None:
    with pytest.raises(UserError, match=r"size 188 .*nearest possible sizes are 184 and 192.*block_size = 4 divides"):
        ops.hadamard(torch.zeros(2, 188))
    with pytest.raises(UserError, match=r"size 7 .* 4 and 8"):
        ops.hadamard_matrix(7)
    with pytest.raises(UserError, match="block_size = 5 does not divide"):
        ops.hadamard(torch.zeros(2, 12), block_size=5)
    with pytest.raises(UserError, match="size 0 must be"):
        ops.hadamard_matrix(0)
    with pytest.raises(UserError, match="at least one element"):
        ops.hadamard(torch.tensor(1.0))
    with pytest.raises(UserError, match="size 8589934583 "):  # a prime: the search for neighbors must end
        ops.hadamard_matrix(2**33 - 9)
    with pytest.raises(RuntimeError, match="does not divide the last axis"):
        torch.ops.fptquant.hadamard(torch.zeros(2, 12), 5, False)
    with pytest.raises(RuntimeError, match="x must be float32"):
        torch.ops.fptquant.hadamard(torch.zeros(2, 12, dtype=torch.int8), 12, False)


def test_a_failing_call_leaks_nothing() -> None:
    large = torch.zeros(1024, 1084)[:, :1036].contiguous()  # 1036 = 4 * 7 * 37 has matrices, 188 has none
    wrong = large.reshape(-1)[: 188 * 5000].reshape(5000, 188)
    assert_no_growth(lambda: torch.ops.fptquant.hadamard(wrong, 188, False), "no Hadamard matrix of size 188")
