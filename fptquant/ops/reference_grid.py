"""The grids of a weight's columns in plain torch, which the references of gptq and coordinate_descent round to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def nearest_in_column(
    scale: Tensor, zero_point: Tensor, group: Tensor, columns: int, qmin: int, qmax: int
) -> Callable[[Tensor, int], Tensor]:
    """What gives the nearest value of the grid for each value [rows] of a column."""
    groups = group.tolist() if group.numel() else [0] * columns
    zeros = zero_point.round() if zero_point.numel() else torch.zeros_like(scale)

    def nearest(values: Tensor, column: int) -> Tensor:
        step, zero = scale[:, groups[column]], zeros[:, groups[column]]
        return (((values / step).round() + zero).clamp(qmin, qmax) - zero) * step

    return nearest
