"""The clipping ratio of a weight's range that leaves the outputs of its layer closest, by the Hessian of its inputs.

For each channel or group, over ratios r from 1 down to 1/2, D H D^T is made small, with D = fake_quant(w; r scale) - w and H the
sum of x x^T over the inputs x that meet these columns. The zero point stays: both ends of the range move by the same ratio.

Source: Lin et al., AWQ, arXiv 2306.00978 (weight clipping), with the Hessian in place of the inputs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fptquant import ops
from fptquant.quantizers.quantizer import Quantizer

RATIOS = tuple(1 - step / 40 for step in range(21))


@torch.no_grad()
def clip_range_(weight: Tensor, quantizer: Quantizer, hessian: Tensor) -> tuple[float, float]:
    """Multiplies the quantizer's scale by the best ratios; returns the sum of D H D^T before and after.

    Shape: weight [rows, columns]; hessian [columns, columns].

    Raises:
        UserError: if the quantizer has no range.
    """
    work = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scale, zero = quantizer.static_qparams(work)
    hessian = hessian.to(work.dtype)
    rounded = partial(ops.fake_quant, work, zero_point=zero, grid=quantizer.grid, granularity=quantizer.granularity)
    before = least = _losses(rounded(scale) - work, hessian, scale)
    best = torch.ones_like(scale)
    for ratio in RATIOS[1:]:
        losses = _losses(rounded(scale * ratio) - work, hessian, scale)
        best = torch.where(losses < least, ratio, best)
        least = torch.minimum(losses, least)
    quantizer.scale = scale * best
    return float(before.sum()), float(least.sum())


def _losses(difference: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """D H D^T of every channel or group, float64, in the shape of the scale."""
    groups = scale.shape[1] if scale.dim() == 2 else 1
    size = difference.shape[1] // groups
    parts = []
    for begin in range(0, difference.shape[1], size):
        columns = slice(begin, begin + size)
        part = difference[:, columns]
        parts.append(((part @ hessian[columns, columns]) * part).sum(1, dtype=torch.float64))
    losses = torch.stack(parts, 1)
    return losses if scale.dim() == 2 else losses[:, 0] if scale.dim() == 1 else losses.sum()
