"""GPTQ word for word, in float64: after every column the inverse of what is left of the Hessian is computed anew."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def obq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    order: Tensor,
    qmin: int,
    qmax: int,
    reach: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Rounds column after column in ``order``; scale and zero_point [rows, columns] are those of each entry.

    ``reach(column, left)`` is called before each column with what is left of the weight; it may change scale and zero_point.
    """
    left, rounded = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    columns = order.tolist()
    for step, column in enumerate(columns):
        if reach is not None:
            reach(column, left)
        others = columns[step:]
        inverse = torch.linalg.inv(hessian[others][:, others])
        value, unit, zero = left[:, column], scale[:, column], zero_point[:, column]
        rounded[:, column] = (((value / unit).round() + zero).clamp(qmin, qmax) - zero) * unit
        error = (value - rounded[:, column]) / inverse[0, 0]
        left[:, others] -= error[:, None] * inverse[0]
    return rounded
