"""coordinate_descent in plain torch: the specification in words of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


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
    groups = group.tolist() if group.numel() else [0] * len(hessian)
    zeros = zero_point.round() if zero_point.numel() else torch.zeros_like(scale)
    error = weight - quantized
    slope = torch.zeros_like(error)  # -E H
    for column, row in enumerate(hessian):
        slope -= error[:, column, None] * row
    for _ in range(sweeps):
        before = quantized.clone()
        for column, row in enumerate(hessian):
            step, zero = scale[:, groups[column]], zeros[:, groups[column]]
            lowest = quantized[:, column] - slope[:, column] / row[column]
            nearest = (((lowest / step).round() + zero).clamp(qmin, qmax) - zero) * step
            move = nearest - quantized[:, column]
            quantized[:, column] = nearest
            error[:, column] = weight[:, column] - nearest
            slope += move[:, None] * row
        if torch.equal(before, quantized):
            break
    return -(error.double() * slope.double()).sum(-1)
