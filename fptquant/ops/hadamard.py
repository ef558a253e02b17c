"""The orthonormal Hadamard transform of blocks of the last axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference
from fptquant.ops._hadamard_factors import hadamard_factors, sizes_up_to

_library.define("hadamard(Tensor x, int block_size, bool transpose) -> Tensor")
_library.fallback("hadamard", reference.hadamard)
_library.fake("hadamard", lambda x, block_size, transpose: torch.empty_like(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block_size, ctx.transpose = inputs


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return _hadamard(dy.contiguous(), ctx.block_size, not ctx.transpose), None, None


_library.autograd("hadamard", _setup_context, _backward)
_hadamard = _library.operator("hadamard")


def hadamard(x: Tensor, *, block_size: int | None = None, transpose: bool = False) -> Tensor:
    """Multiplies every block of the last axis by the orthonormal Hadamard matrix.

    y[..., b, :] = H x[..., b, :] / sqrt(n), or H^T x / sqrt(n); H is ``hadamard_matrix(n)``, n = block_size.
    n = 2^k times sizes of constructed matrices (12, 20, 28, 36, ..., 172): n (k + the sum of these sizes) additions.
    The matrix need not be symmetric: the inverse, which is also the gradient, is the other ``transpose``.

    Shape:
        x: [..., N], float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        block_size: divides N; default N.
        returns: like x.

    Raises:
        UserError: if no matrix of this size can be constructed (names possible ones) or the block does not divide N.

    Source: Paley (1933), Williamson (1944), Sylvester (1867).

    >>> x = torch.arange(12.0)
    >>> torch.allclose(hadamard(hadamard(x), transpose=True), x, atol=1e-5)
    True
    """
    if x.dim() == 0 or x.shape[-1] == 0:
        raise UserError(f"hadamard: x has shape {list(x.shape)}; the last axis needs at least one element")
    size = x.shape[-1] if block_size is None else block_size
    if size < 1 or x.shape[-1] % size:
        raise UserError(f"hadamard: block_size = {size} does not divide the last axis of shape {list(x.shape)}")
    if not torch.compiler.is_compiling():  # the operator itself refuses impossible sizes too, as a RuntimeError
        hadamard_factors(size)
    result: Tensor = _hadamard(x.contiguous(), size, transpose)
    return result


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The n x n matrix of +1 and -1 that ``hadamard`` multiplies by (not divided by sqrt(n)); H H^T = n I.

    Raises:
        UserError: if no matrix of this size can be constructed.

    >>> hadamard_matrix(2)
    tensor([[ 1.,  1.],
            [ 1., -1.]], dtype=torch.float64)
    """
    matrix = torch.ones((1, 1), dtype=dtype)
    for factor in hadamard_factors(n):
        matrix = torch.kron(matrix, factor.to(dtype))
    return matrix


def hadamard_additions(n: int) -> int:
    """Additions for each element of a vector of size n: k + the sum of the sizes of constructed matrices, as in `hadamard`.

    Raises:
        UserError: if no matrix of this size can be constructed.

    >>> hadamard_additions(64), hadamard_additions(12 * 128)
    (6, 19)
    """
    return sum(len(factor) if len(factor) > 2 else 1 for factor in hadamard_factors(n))


def hadamard_sizes(limit: int) -> list[int]:
    """All sizes up to ``limit`` of which a Hadamard matrix can be constructed.

    >>> hadamard_sizes(24)
    [1, 2, 4, 8, 12, 16, 20, 24]
    """
    return sizes_up_to(limit)
