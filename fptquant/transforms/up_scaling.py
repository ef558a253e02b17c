"""T_u: a scale per channel of the up projection, undone in the down projection."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Transform, compute_dtype


class UpScaling(Transform):
    """Scales the channels of the up projection's output.

    forward: u'_j = exp(log_scale_j) u_j;  inverse: u_j = exp(-log_scale_j) u'_j.
    The gated product silu(gate) * up is linear in up, so the scale passes through it to the down projection.

    Shape: log_scale [I]; activations [..., I]; up_proj weight [I, in] or bias [I] (side ``up``), down_proj weight
    [out, I] (side ``down``; its bias is not touched).

    Source: FPTQuant (arXiv 2506.04985), pseudodynamic up/down scaling.
    """

    symbol: ClassVar[str] = "T_u"
    name: ClassVar[str] = "up_scaling"
    mergeable: ClassVar[bool] = True
    online: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("up", "down")

    def __init__(self, intermediate_size: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(intermediate_size))

    def forward(self, x: Tensor) -> Tensor:
        """Scales the up projection's output [..., I]."""
        dtype = compute_dtype(x)
        return (x.to(dtype) * self.log_scale.to(dtype).exp()).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes the scale, of the up projection's output or of the down projection's input, [..., I]."""
        dtype = compute_dtype(x)
        return (x.to(dtype) * (-self.log_scale.to(dtype)).exp()).to(x.dtype)

    def merge_into(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        size, axis = self.log_scale.numel(), 0 if side == "up" else -1
        if weight.shape[axis] != size:
            raise UserError(f"T_u of {size} channels does not fit a weight of shape {list(weight.shape)} on side {side}")
        log_scale = self.log_scale.double()
        if side == "down":
            return ops.merge_scale(weight.double(), column_log_scale=-log_scale).to(weight.dtype)
        wide = weight.double() if weight.dim() == 2 else weight.double().unsqueeze(-1)
        return ops.merge_scale(wide, row_log_scale=log_scale).reshape(weight.shape).to(weight.dtype)

    def describe(self) -> dict[str, Any]:
        scale = self.log_scale.detach().exp()
        return {
            **super().describe(),
            "smallest_scale": float(scale.min()),
            "largest_scale": float(scale.max()),
        }
