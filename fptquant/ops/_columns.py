"""What gptq_ and coordinate_descent_ both ask of their arguments: a weight whose columns are worked on one after the other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fptquant.errors import UserError


def check_worked_on(op: str, name: str, tensor: Tensor, why: str) -> None:
    """Refuses what cannot be changed in place in its own dtype."""
    if tensor.dim() != 2 or tensor.dtype not in (torch.float32, torch.float64) or not tensor.is_contiguous():
        raise UserError(
            f"{op}: {name} {list(tensor.shape)} {tensor.dtype} must be a contiguous matrix in float32 or float64; {why} in its own "
            "dtype"
        )


def check_columns(
    op: str,
    what: str,
    worked_on: Tensor,
    like_it: Mapping[str, Tensor],
    square: str,
    scale: Tensor,
    zero_point: Tensor | None,
    group: Tensor | None,
) -> None:
    """Refuses grids, and a matrix of the columns (``like_it[square]``), that do not fit; all have the dtype of ``worked_on``."""
    (rows, columns), shape = worked_on.shape, f"{what} {list(worked_on.shape)}"
    matrix = like_it[square]
    if matrix.shape != (columns, columns):
        raise UserError(f"{op}: {square} {list(matrix.shape)} must be [{columns}, {columns}] for {shape}")
    if scale.dim() != 2 or scale.shape[0] != rows:
        raise UserError(f"{op}: scale {list(scale.shape)} must be [{rows}, groups] for {shape}")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise UserError(f"{op}: zero_point {list(zero_point.shape)} must have the shape of scale {list(scale.shape)}")
    for name, tensor in {**like_it, "scale": scale, "zero_point": zero_point}.items():
        if tensor is not None and tensor.dtype != worked_on.dtype:
            raise UserError(f"{op}: {name} is {tensor.dtype}, {what} {worked_on.dtype}")
    if group is not None and (group.shape != (columns,) or group.dtype != torch.int64):
        raise UserError(f"{op}: group {list(group.shape)} {group.dtype} must be [{columns}] int64")
