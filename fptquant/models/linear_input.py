"""Activations are transformed and quantized on their way into a linear, by one operator where there is one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fptquant.models.context import ForwardContext
from fptquant.quantizers.quantizer import Quantizer
from fptquant.transforms.base import Transform
from fptquant.transforms.kronecker import Kronecker


def transform_and_quantize(
    x: Tensor, transforms: Sequence[Transform], quantizer: Quantizer | None, context: ForwardContext
) -> Tensor:
    """The transforms one after the other, then the quantizer, if any.

    Shape: x and result [B, T, C].
    """
    kept = None if quantizer is None else context.kept_tokens(x, quantizer.full_precision_tokens)
    last = transforms[-1] if transforms else None
    fused = isinstance(last, Kronecker) and quantizer is not None and quantizer.is_fusible and kept is None
    for transform in transforms[:-1] if fused else transforms:
        x = transform(x)
    if quantizer is None:
        return x
    if isinstance(last, Kronecker) and fused:
        return _fused(x, last, quantizer)
    y: Tensor = quantizer(x, kept)
    return y


def _fused(x: Tensor, product: Kronecker, quantizer: Quantizer) -> Tensor:
    if quantizer.dynamic:
        clip_ratio = quantizer.range_method.clip_ratio
        return product.fake_quant_dynamic(x, quantizer.clip, grid=quantizer.grid, clip_ratio=clip_ratio)
    return product.fake_quant(x, *quantizer.static_qparams(x), grid=quantizer.grid)
