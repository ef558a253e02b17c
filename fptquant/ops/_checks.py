"""Checks that several operators share; each raises UserError with the shapes in it."""

from __future__ import annotations

from torch import Tensor

from fptquant.errors import UserError
from fptquant.quantizers.grid import Granularity, channel_layout


def heads_of(name: str, weight: Tensor, angle: Tensor, log_scale: Tensor, group: int) -> int:
    """The number of heads (kv heads times group) of a weight or bias whose RoPE pairs angle and log_scale describe."""
    if angle.dim() != 2 or angle.shape != log_scale.shape:
        raise UserError(
            f"{name}: angle {list(angle.shape)} and log_scale {list(log_scale.shape)} must both be [kv_heads, head_dim / 2]"
        )
    rows = angle.shape[0] * group * 2 * angle.shape[1]
    if group < 1 or weight.dim() not in (1, 2) or weight.shape[0] != rows:
        raise UserError(
            f"{name}: weight has shape {list(weight.shape)}, but {angle.shape[0]} kv heads with {group} heads each and "
            f"head_dim {2 * angle.shape[1]} need {rows} rows"
        )
    return angle.shape[0] * group


def row_and_column(name: str, weight: Tensor, row: Tensor | None, column: Tensor | None) -> None:
    """The weight is [R, C] or [R]; row is [R] and column [C], each only if given."""
    if weight.dim() not in (1, 2):
        raise UserError(f"{name}: weight has shape {list(weight.shape)}; it must be a matrix [R, C] or a bias [R]")
    columns = weight.shape[1] if weight.dim() == 2 else 1
    for label, scale, length in (("row_log_scale", row, weight.shape[0]), ("column_log_scale", column, columns)):
        if scale is not None and (scale.dim() != 1 or scale.shape[0] != length):
            raise UserError(f"{name}: {label} has shape {list(scale.shape)}, but weight {list(weight.shape)} needs [{length}]")


def fused_inner(name: str, weight: Tensor, scale: Tensor, zero_point: Tensor | None, granularity: Granularity) -> int:
    """How many columns share a quantizer scale: the fused operators serve scales per row or per group of a row."""
    if weight.dim() != 2:
        raise UserError(f"{name}: weight has shape {list(weight.shape)}; it must be a matrix")
    layout = channel_layout(granularity, weight.shape)
    if layout.outer != 1 or layout.inner < 1 or weight.shape[1] % layout.inner:
        raise UserError(
            f"{name}: {granularity} does not give one scale per row or per group of a row; merge first, then fake_quant"
        )
    for label, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.numel() != layout.channels:
            raise UserError(
                f"{name}: {label} has shape {list(tensor.shape)}, but {granularity} on weight {list(weight.shape)} "
                f"needs {list(layout.scale_shape)}"
            )
    return layout.inner


def exponent(name: str, p: float) -> float:
    """An exponent of a norm whose gradient exists everywhere."""
    if not 1.0 <= p <= 16.0:
        raise UserError(f"{name}: p = {p} must lie between 1 and 16")
    return float(p)
