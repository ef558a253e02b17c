"""Cyclic coordinate descent on rounded weights: each column goes where the rest of its row wants it, over and over."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference_coordinate_descent
from fptquant.ops._columns import check_columns, check_worked_on
from fptquant.quantizers.grid import IntegerGrid

_library.define(
    "coordinate_descent_(Tensor(a!) quantized, Tensor weight, Tensor hessian, Tensor scale, Tensor zero_point, Tensor group, "
    "int sweeps, int grid, int qmin, int qmax) -> Tensor"
)
_library.fallback("coordinate_descent_", reference_coordinate_descent.coordinate_descent_)
_library.fake("coordinate_descent_", lambda quantized, *rest: quantized.new_empty(quantized.shape[0], dtype=torch.float64))
_coordinate_descent_ = _library.operator("coordinate_descent_")


def coordinate_descent_(
    quantized: Tensor,
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    grid: IntegerGrid,
    group: Tensor | None = None,
    sweeps: int = 1,
) -> Tensor:
    """Improves a rounded weight in place: each entry takes the value of its grid that is best for its row, all others as they are.

    With E = weight - quantized and H the Hessian of the inputs, for every column j, ``sweeps`` times or until nothing changes:

        q_j <- fake_quant(q_j + (E H)_j / H_jj)

    E H E^T of no row grows. All values must lie on the grid to begin with.

    Args:
        group: which scale of its row each column has; the first by default.

    Shape:
        quantized: [R, C] float32 or float64, contiguous; changed. No gradient.
        weight: [R, C] like quantized.
        hessian: [C, C] like quantized, symmetric, its diagonal positive.
        scale, zero_point: [R, G]; zero_point is 0 if left out.
        group: [C] int64, from 0 to G - 1.
        returns: [R] float64, E H E^T of each row at the end.

    Raises:
        UserError: if shapes or dtypes do not fit.
        RuntimeError: if a diagonal entry of the Hessian or a scale is not positive and finite; names it.

    Source: Behdin et al., QuantEase, arXiv 2309.01885; from GPTQ's result, as here, Nair and Suggala, CDQuant, arXiv 2406.17542.

    >>> quantized = torch.tensor([[0.0, 1.0]])
    >>> weight, hessian = torch.tensor([[0.4, 0.6]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> coordinate_descent_(quantized, weight, hessian, torch.ones(1, 1), grid=IntegerGrid(4))
    tensor([0.0320], dtype=torch.float64)
    """
    _check(quantized, weight, hessian, scale, zero_point, group, sweeps)
    zero = _library.absent(quantized) if zero_point is None else zero_point.contiguous()
    groups = quantized.new_empty(0, dtype=torch.int64) if group is None else group.contiguous()
    options = (sweeps, grid.kind, grid.qmin, grid.qmax)
    loss: Tensor = _coordinate_descent_(
        quantized, weight.contiguous(), hessian.contiguous(), scale.contiguous(), zero, groups, *options
    )
    return loss


def _check(
    quantized: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor | None, group: Tensor | None, sweeps: int
) -> None:
    op = "coordinate_descent_"
    check_worked_on(op, "quantized", quantized, "slopes are summed")
    if weight.shape != quantized.shape:
        raise UserError(f"{op}: weight {list(weight.shape)} must have the shape of quantized {list(quantized.shape)}")
    check_columns(op, "quantized", quantized, {"weight": weight, "hessian": hessian}, "hessian", scale, zero_point, group)
    if sweeps < 0:
        raise UserError(f"{op}: sweeps = {sweeps} is negative")
