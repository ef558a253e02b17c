"""Permuted channels, multiplied block by block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference

_library.define("rotate_blocks(Tensor x, Tensor matrices, Tensor permutation, bool transpose) -> Tensor")
_library.fallback("rotate_blocks", reference.rotate_blocks)
_library.fake("rotate_blocks", lambda x, *rest: torch.empty_like(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, matrices, permutation, ctx.transpose = inputs
    ctx.save_for_backward(matrices, permutation)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    matrices, permutation = ctx.saved_tensors
    return _rotate_blocks(dy.contiguous(), matrices, permutation, not ctx.transpose), None, None, None


_library.autograd("rotate_blocks", _setup_context, _backward)
_rotate_blocks = _library.operator("rotate_blocks")


def rotate_blocks(x: Tensor, matrices: Tensor, permutation: Tensor | None = None, *, transpose: bool = False) -> Tensor:
    """Permutes the channels of the last axis and multiplies every block of them by a matrix of its own.

    y[..., k b + i] = sum over j of matrices[k, i, j] x[..., permutation[k b + j]], with blocks k of b channels; with ``transpose``
    the transposed matrices first, then every channel back to where it came from: for orthogonal matrices the inverse.

    Shape:
        x: [..., K * b], float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        matrices: [K, b, b]; permutation: int64 [K * b], every channel once, or None: all stay.
        returns: like x.

    Gradient: for x; the matrices are constants.

    Raises:
        UserError: if the shapes do not fit.
        RuntimeError: if a channel is missing in the permutation; names the entry.

    Source: DuQuant, arXiv 2406.01721.

    >>> rotate_blocks(torch.tensor([1.0, 2.0]), torch.ones(2, 1, 1), torch.tensor([1, 0]))
    tensor([2., 1.])
    """
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
        raise UserError(f"rotate_blocks: matrices have shape {list(matrices.shape)}; they must be [blocks, size, size]")
    channels = matrices.shape[0] * matrices.shape[1]
    if x.dim() == 0 or x.shape[-1] != channels:
        raise UserError(f"rotate_blocks: x has shape {list(x.shape)}, but the matrices have {channels} channels")
    if permutation is not None and (permutation.shape != (channels,) or permutation.dtype != torch.int64):
        raise UserError(f"rotate_blocks: permutation has shape {list(permutation.shape)}; it must be int64 [{channels}]")
    order = x.new_empty(0, dtype=torch.int64) if permutation is None else permutation.contiguous()
    result: Tensor = _rotate_blocks(x.contiguous(), _library.parameter(matrices.detach(), x), order, transpose)
    return result
