"""What transforms that scale channels have in common: T_u and T_n."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.quantizers.grid import Granularity, IntegerGrid
from fptquant.transforms.base import Transform, compute_dtype, is_per_row


class ChannelScaling(Transform):
    """Scales the channels of an activation.

    forward: x'_j = exp(log_scale_j) x_j;  inverse: x_j = exp(-log_scale_j) x'_j.
    Merged, the first side scales its rows (a weight [C, in], a bias or gain [C]), the second undoes it in its columns
    (a weight [out, C]; its bias is not touched).

    Shape: log_scale [C]; activations [..., C].
    """

    mergeable: ClassVar[bool] = True
    online: ClassVar[bool] = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scales the activation [..., C]."""
        dtype = compute_dtype(x)
        return (x.to(dtype) * self.log_scale.to(dtype).exp()).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes the scale, where the activation is read, [..., C]."""
        dtype = compute_dtype(x)
        return (x.to(dtype) * (-self.log_scale.to(dtype)).exp()).to(x.dtype)

    def _row_and_column(self, weight: Tensor, side: str) -> tuple[Tensor | None, Tensor | None]:
        """The logarithms by which rows and columns of a weight on this side are scaled."""
        self._check_side(side)
        size, rows = self.log_scale.numel(), side == self.sides[0]
        if weight.shape[0 if rows else -1] != size:
            raise UserError(f"{self.symbol} of {size} channels does not fit a weight of shape {list(weight.shape)} on side {side}")
        return (self.log_scale, None) if rows else (None, -self.log_scale)

    def merge(self, weight: Tensor, side: str) -> Tensor:
        return ops.merge_scale(weight, *self._row_and_column(weight, side))

    def merge_fake_quant(
        self, weight: Tensor, side: str, scale: Tensor, zero_point: Tensor | None, *, grid: IntegerGrid, granularity: Granularity
    ) -> Tensor:
        if not is_per_row(granularity):
            return super().merge_fake_quant(weight, side, scale, zero_point, grid=grid, granularity=granularity)
        row, column = self._row_and_column(weight, side)
        return ops.merge_scale_fake_quant(weight, row, column, scale, zero_point, grid=grid, granularity=granularity)

    def describe(self) -> dict[str, Any]:
        scale = self.log_scale.detach().exp()
        return {
            **super().describe(),
            "smallest_scale": float(scale.min()),
            "largest_scale": float(scale.max()),
        }
