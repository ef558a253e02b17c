"""T_n: a scale per channel of a norm's output, undone in the linears that read it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Transform, compute_dtype


class NormScaling(Transform):
    """Scales the channels of an RMSNorm's output, by its gain.

    forward: x'_j = exp(log_scale_j) x_j;  inverse: x_j = exp(-log_scale_j) x'_j.
    The gain comes after the division by the root mean square, so the residual and the norm's statistics stay as they are.

    Shape: log_scale [H]; activations [..., H]; gain [H] of the norm (side ``norm``), weight [out, H] of a linear that reads it
    (side ``read``; its bias is not touched).

    Source: Xiao et al., SmoothQuant (arXiv 2211.10438), which migrates outliers from activations to weights in this way.
    """

    symbol: ClassVar[str] = "T_n"
    mergeable: ClassVar[bool] = True
    online: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("norm", "read")

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Scales the norm's output [..., H]."""
        dtype = compute_dtype(x)
        return (x.to(dtype) * self.log_scale.to(dtype).exp()).to(x.dtype)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes the scale, at the input of a linear [..., H]."""
        dtype = compute_dtype(x)
        return (x.to(dtype) * (-self.log_scale.to(dtype)).exp()).to(x.dtype)

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        if weight.shape[-1] != self.log_scale.numel():
            raise UserError(
                f"T_n of {self.log_scale.numel()} channels does not fit a weight of shape {list(weight.shape)} on side {side}"
            )
        return ops.merge_scale(weight, self.log_scale) if side == "norm" else ops.merge_scale(weight, None, -self.log_scale)

    def describe(self) -> dict[str, Any]:
        scale = self.log_scale.detach().exp()
        return {**super().describe(), "smallest_scale": float(scale.min()), "largest_scale": float(scale.max())}


class AttentionInputScaling(NormScaling):
    """T_n of the norm before attention, read by q, k and v."""

    name: ClassVar[str] = "attn_in_scaling"


class MLPInputScaling(NormScaling):
    """T_n of the norm before the MLP, read by gate and up."""

    name: ClassVar[str] = "mlp_in_scaling"
