"""gptq in plain torch: the specification in words of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


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
    groups = group.tolist() if group.numel() else [0] * weight.shape[1]
    zeros = zero_point.round() if zero_point.numel() else torch.zeros_like(scale)
    loss = weight.new_zeros(weight.shape[0], dtype=torch.float64)
    for column in range(begin, end):
        step, zero = scale[:, groups[column]], zeros[:, groups[column]]
        value = weight[:, column].clone()
        quantized = (((value / step).round() + zero).clamp(qmin, qmax) - zero) * step
        error = (value - quantized) / factor[column, column]
        loss += error.double().square()
        weight[:, column] = quantized
        weight[:, column + 1 :] -= error[:, None] * factor[column, column + 1 :]
    return loss
