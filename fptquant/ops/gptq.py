"""GPTQ's column update: columns are quantized one after the other, and those that follow make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference_gptq
from fptquant.ops._columns import check_columns, check_worked_on
from fptquant.quantizers.grid import IntegerGrid

_library.define(
    "gptq_(Tensor(a!) weight, Tensor factor, Tensor scale, Tensor zero_point, Tensor group, int begin, int end, int grid, "
    "int qmin, int qmax) -> Tensor"
)
_library.fallback("gptq_", reference_gptq.gptq_)
_library.fake("gptq_", lambda weight, *rest: weight.new_empty(weight.shape[0], dtype=torch.float64))
_gptq_ = _library.operator("gptq_")


def gptq_(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    grid: IntegerGrid,
    group: Tensor | None = None,
    begin: int = 0,
    end: int | None = None,
) -> Tensor:
    """Quantizes columns of a weight in place, one after the other, and lets the columns that follow make up for each error.

    With H the sum of x x^T over the inputs x of the layer, and ``factor`` the upper triangular U with U^T U = H^-1, for
    j = begin .. end - 1:

        q_j = fake_quant(w_j)    e_j = (w_j - q_j) / U_jj    w_k <- w_k - e_j U_jk for all k > j    w_j <- q_j

    A range of columns at a time, ranges of later columns can be set from weights that have taken over the errors before
    them. Another order of columns is a permutation of weight, H and group before the call.

    Args:
        group: which scale of its row each column has; the first by default.

    Shape:
        weight: [R, C] float32 or float64, contiguous; changed. No gradient.
        factor: [C, C] like weight; only its upper triangle is read.
        scale, zero_point: [R, G]; zero_point is 0 if left out.
        group: [C] int64, from 0 to G - 1.
        returns: [R] float64, the sum of e_j^2; over all columns it is (w - q) H (w - q)^T for w the row before the call.

    Raises:
        UserError: if shapes or dtypes do not fit.
        RuntimeError: if a diagonal entry of factor or a scale is not positive and finite; names it.

    Source: Frantar et al., GPTQ, arXiv 2210.17323, with the Cholesky factor of the inverse that its section 3.3 proposes.

    >>> weight = torch.tensor([[0.4, 1.0]])
    >>> gptq_(weight, torch.tensor([[1.0, -0.5], [0.0, 1.0]]), torch.ones(1, 1), grid=IntegerGrid(4))
    tensor([0.2000], dtype=torch.float64)
    >>> weight
    tensor([[0., 1.]])
    """
    end = weight.shape[-1] if end is None else end
    _check(weight, factor, scale, zero_point, group, begin, end)
    zero = _library.absent(weight) if zero_point is None else zero_point.contiguous()
    groups = weight.new_empty(0, dtype=torch.int64) if group is None else group.contiguous()
    loss: Tensor = _gptq_(
        weight, factor.contiguous(), scale.contiguous(), zero, groups, begin, end, grid.kind, grid.qmin, grid.qmax
    )
    return loss


def _check(
    weight: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor | None, group: Tensor | None, begin: int, end: int
) -> None:
    op, columns = "gptq_", weight.shape[-1]
    check_worked_on(op, "weight", weight, "errors are spread")
    if not 0 <= begin <= end <= columns:
        raise UserError(f"{op}: columns {begin} to {end} are not within the {columns} of the weight")
    check_columns(op, "the weight", weight, {"factor": factor}, "factor", scale, zero_point, group)
