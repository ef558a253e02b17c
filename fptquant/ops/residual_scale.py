"""S_n: RMS, normalized residual and running scale of every token in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference

_library.define("residual_scale(Tensor residual, Tensor running_scale, float eps) -> (Tensor, Tensor)")
_library.define(
    "residual_scale_backward(Tensor dnormalized, Tensor dnew_running_scale, Tensor residual, Tensor running_scale, "
    "float eps) -> (Tensor, Tensor)"
)
_library.fallback("residual_scale", reference.residual_scale)
_library.fallback("residual_scale_backward", reference.residual_scale_backward)
_library.fake("residual_scale", lambda residual, running, eps: (torch.empty_like(residual), torch.empty_like(running)))
_library.fake(
    "residual_scale_backward",
    lambda dnormalized, dnew, residual, running, eps: (torch.empty_like(residual), torch.empty_like(running)),
)

_residual_scale = _library.operator("residual_scale")
_residual_scale_backward = _library.operator("residual_scale_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    residual, running_scale, ctx.eps = inputs
    ctx.save_for_backward(residual, running_scale)


def _backward(ctx: Any, dnormalized: Tensor, dnew: Tensor) -> tuple[Tensor, Tensor, None]:
    residual, running_scale = ctx.saved_tensors
    dresidual, drunning = _residual_scale_backward(dnormalized.contiguous(), dnew.contiguous(), residual, running_scale, ctx.eps)
    return dresidual, drunning, None


_library.autograd("residual_scale", _setup_context, _backward)


def residual_scale(residual: Tensor, running_scale: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Normalizes a residual that was already divided by a running scale, and carries that scale on.

    m = sqrt(mean(residual^2) + eps / running_scale^2), normalized = residual / m, new_running_scale = running_scale m.
    With the true residual r = residual * running_scale, ``normalized`` is exactly RMSNorm(r) with gain 1, and
    r = normalized * new_running_scale. The mean is summed in float64.

    Shape:
        residual: [..., H]; running_scale: [..., 1], positive, float32 (float64 for float64 residuals).
        returns: (normalized like residual, new_running_scale like running_scale).

    Gradient: for both.

    Raises:
        UserError: if the shapes do not fit or eps is negative.

    Source: FPTQuant, arXiv 2506.04985, S_n; the division of eps by the squared scale is this project's.

    >>> normalized, scale = residual_scale(torch.full((1, 4), 3.0), torch.full((1, 1), 2.0), eps=0.0)
    >>> normalized, scale
    (tensor([[1., 1., 1., 1.]]), tensor([[6.]]))
    """
    if residual.dim() < 1 or residual.shape[-1] == 0 or running_scale.shape != (*residual.shape[:-1], 1):
        raise UserError(
            f"residual_scale: residual {list(residual.shape)} needs a running_scale of shape "
            f"{[*residual.shape[:-1], 1]}, not {list(running_scale.shape)}"
        )
    if not eps >= 0.0:
        raise UserError(f"residual_scale: eps = {eps} must not be negative")
    normalized, new = _residual_scale(residual.contiguous(), _library.parameter(running_scale, residual), eps)
    return normalized, new
