"""Row and column scaling of a weight (T_u, norm gains): plain, and fused with fake_quant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _checks, _library, reference
from fptquant.ops.hadamard import hadamard
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel

_library.define("merge_scale(Tensor weight, Tensor row_log_scale, Tensor column_log_scale) -> Tensor")
_library.define(
    "merge_scale_backward(Tensor dy, Tensor weight, Tensor row_log_scale, Tensor column_log_scale, "
    "bool weight_gradient) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "merge_scale_fake_quant(Tensor weight, Tensor row_log_scale, Tensor column_log_scale, Tensor scale, "
    "Tensor zero_point, int inner, int grid, int qmin, int qmax) -> Tensor"
)
_library.define(
    "merge_scale_fake_quant_backward(Tensor dy, Tensor weight, Tensor row_log_scale, Tensor column_log_scale, "
    "Tensor scale, Tensor zero_point, int inner, int grid, int qmin, int qmax, bool weight_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("scale_moments(Tensor weight, float p) -> (Tensor, Tensor)")

for _name in (
    "merge_scale",
    "merge_scale_backward",
    "merge_scale_fake_quant",
    "merge_scale_fake_quant_backward",
    "scale_moments",
):
    _library.fallback(_name, getattr(reference, _name))

_library.derivative("merge_scale", 3)
_library.derivative("merge_scale_fake_quant", 5)


def _fake_moments(weight: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return tuple(weight.new_empty(n, dtype=torch.float64) for n in weight.shape)  # type: ignore[return-value]


_library.fake("scale_moments", _fake_moments)

_merge = _library.operator("merge_scale")
_merge_backward = _library.operator("merge_scale_backward")
_merge_fake_quant = _library.operator("merge_scale_fake_quant")
_moments = _library.operator("scale_moments")


def merge_scale(weight: Tensor, row_log_scale: Tensor | None = None, column_log_scale: Tensor | None = None) -> Tensor:
    """Scales rows and columns of a weight: y[r, c] = weight[r, c] exp(row_log_scale[r]) exp(column_log_scale[c]).

    Shape:
        weight: [R, C], or a bias [R] (seen as [R, 1]); row_log_scale: [R] or None; column_log_scale: [C] or None.
        returns: like weight.

    Gradient: for weight and both log scales (sums in float64).

    Raises:
        UserError: if the shapes do not fit; names them.

    Source: FPTQuant, arXiv 2506.04985, T_u.

    >>> merge_scale(torch.ones(2, 2), torch.tensor([2.0, 3.0]).log()).round()
    tensor([[2., 2.],
            [3., 3.]])
    """
    _checks.row_and_column("merge_scale", weight, row_log_scale, column_log_scale)
    row, column = (_library.parameter(t, weight) for t in (row_log_scale, column_log_scale))
    result: Tensor = _merge(weight.contiguous(), row, column)
    return result


def merge_scale_fake_quant(
    weight: Tensor,
    row_log_scale: Tensor | None,
    column_log_scale: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    grid: IntegerGrid,
    granularity: Granularity = PerChannel(),  # noqa: B008  a frozen value
) -> Tensor:
    """fake_quant(merge_scale(weight)) without writing the merged weight.

    The merged value is not rounded to the dtype of weight in between; otherwise equal to the two operators in turn.

    Shape:
        weight: [R, C]; row_log_scale: [R] or None; column_log_scale: [C] or None.
        scale, zero_point: [R] with PerChannel(0), [R, 1] with PerToken, [R, C / group_size] with PerGroup.
        returns: like weight.

    Gradient: for weight (straight-through), both log scales, scale and zero_point (LSQ).

    Raises:
        UserError: if the shapes do not fit, or the granularity does not give one scale per row or group of a row.
    """
    _checks.row_and_column("merge_scale_fake_quant", weight, row_log_scale, column_log_scale)
    inner = _checks.fused_inner("merge_scale_fake_quant", weight, scale, zero_point, granularity)
    row, column, scale, zero = (_library.parameter(t, weight) for t in (row_log_scale, column_log_scale, scale, zero_point))
    result: Tensor = _merge_fake_quant(weight.contiguous(), row, column, scale, zero, inner, grid.kind, grid.qmin, grid.qmax)
    return result


ROWS_AT_A_TIME = 64
"""Rows of a weight that `merge_scale_hadamard` scales before it transforms them: they stay in the cache."""


class _MergeScaleHadamard(torch.autograd.Function):
    """Works through the rows in blocks, so that the scaled weight never exists beside the transformed one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, column: Tensor, block_size: int) -> Tensor:
        ctx.save_for_backward(weight, column)
        ctx.block_size = block_size
        merged = torch.empty_like(weight)
        for first in range(0, weight.shape[0], ROWS_AT_A_TIME):
            rows = slice(first, first + ROWS_AT_A_TIME)
            merged[rows] = hadamard(merge_scale(weight[rows], None, column), block_size=block_size)
        return merged

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        weight, column = ctx.saved_tensors
        dscaled = hadamard(dy, block_size=ctx.block_size, transpose=True)
        wanted = ctx.needs_input_grad[0]
        dweight, _, dcolumn = _merge_backward(dscaled, weight, _library.absent(weight), column, wanted)
        return (dweight if wanted else None), dcolumn, None


def merge_scale_hadamard(weight: Tensor, column_log_scale: Tensor, *, block_size: int | None = None) -> Tensor:
    """hadamard(merge_scale(weight, None, column_log_scale)), bit for bit, without a scaled copy of the weight.

    Shape:
        weight: [R, C]; column_log_scale: [C]; block_size: divides C; default C. Returns: like weight.

    Gradient: for weight and column_log_scale (sums in float64).

    Raises:
        UserError: as `merge_scale` and `fptquant.ops.hadamard`.

    Source: FPTQuant, arXiv 2506.04985: T_u and the Hadamard transform at the down projection.

    >>> merge_scale_hadamard(torch.ones(1, 2), torch.tensor([2.0, 4.0]).log()).mul(2**0.5).round()
    tensor([[ 6., -2.]])
    """
    _checks.row_and_column("merge_scale_hadamard", weight, None, column_log_scale)
    size = weight.shape[-1] if block_size is None else block_size
    column = _library.parameter(column_log_scale, weight)
    merged: Tensor = _MergeScaleHadamard.apply(weight.contiguous(), column, size)  # type: ignore[no-untyped-call]
    return merged


def scale_moments(weight: Tensor, *, p: float = 4.0) -> tuple[Tensor, Tensor]:
    """The sums of |w|^p over each row and over each column: all that the best T_u depends on.

    Shape:
        weight: [R, C]. Returns: (row [R], column [C]), float64. No gradient.

    Raises:
        UserError: if weight is not a matrix or p lies outside 1..16.

    >>> scale_moments(torch.tensor([[1.0, 2.0]]))
    (tensor([17.], dtype=torch.float64), tensor([ 1., 16.], dtype=torch.float64))
    """
    if weight.dim() != 2:
        raise UserError(f"scale_moments: weight has shape {list(weight.shape)}; it must be a matrix")
    row, column = _moments(weight.detach().contiguous(), _checks.exponent("scale_moments", p))
    return row, column
