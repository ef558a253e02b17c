"""coordinate_descent in plain torch: the specification in words of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.ops.reference_grid import nearest_in_column


def coordinate_descent_(
    quantized: Tensor,
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    sweeps: int,
    grid: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Moves every column of ``quantized`` in place, one after the other; returns the loss of each row, float64."""
    nearest = nearest_in_column(scale, zero_point, group, len(hessian), qmin, qmax)
    error = weight - quantized
    slope = torch.zeros_like(error)  # -E H
    for column, row in enumerate(hessian):
        slope -= error[:, column, None] * row
    for _ in range(sweeps):
        before = quantized.clone()
        for column, row in enumerate(hessian):
            lowest = quantized[:, column] - slope[:, column] / row[column]
            value = nearest(lowest, column)
            move = value - quantized[:, column]
            quantized[:, column] = value
            error[:, column] = weight[:, column] - value
            slope += move[:, None] * row
        if torch.equal(before, quantized):
            break
    return -(error.double() * slope.double()).sum(-1)
