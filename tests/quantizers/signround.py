"""AutoRound's formula word for word, with autograd and a rounding that passes its gradient straight through."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.quantizers.grid import IntegerGrid


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def signround(weight: Tensor, low: Tensor, high: Tensor, offset: Tensor, upper: Tensor, lower: Tensor, grid: IntegerGrid) -> Tensor:
    """scale (clamp(round(W / scale + V) + zero_point) - zero_point) for the range [lower * low, upper * high].

    Everything has a value for each entry of the weight. A symmetric grid has ``high`` = qmax times its scale, and no ``low``.
    """
    if grid.symmetric:
        scale, zero = upper * high / grid.qmax, torch.zeros_like(weight)
    else:
        scale = (upper * high - lower * low) / (grid.qmax - grid.qmin)
        zero = straight_through(grid.qmin - lower * low / scale)
    integer = straight_through(weight / scale + offset) + zero
    return scale * (integer.clamp(grid.qmin, grid.qmax) - zero)
