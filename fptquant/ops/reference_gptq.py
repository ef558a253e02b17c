"""gptq in plain torch: the specification in words of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.ops.reference_grid import nearest_in_column


def gptq_(
    weight: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    begin: int,
    end: int,
    grid: int,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Quantizes columns [begin, end) of ``weight`` in place, one after the other; returns the loss of each row, float64."""
    nearest = nearest_in_column(scale, zero_point, group, weight.shape[1], qmin, qmax)
    loss = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    for column in range(begin, end):
        value = weight[:, column].clone()
        quantized = nearest(value, column)
        error = (value - quantized) / factor[column, column]
        loss += error.double().square()
        weight[:, column] = quantized
        weight[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return loss
