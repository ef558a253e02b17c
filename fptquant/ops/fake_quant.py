"""Fake quantization: rounds to a grid and returns to real numbers, with straight-through and LSQ gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerTensor, channel_layout

_library.define("fake_quant(Tensor x, Tensor scale, Tensor zero_point, int inner, int grid, int qmin, int qmax) -> Tensor")
_library.define(
    "fake_quant_backward(Tensor dy, Tensor x, Tensor scale, Tensor zero_point, int inner, int grid, int qmin, int qmax) "
    "-> (Tensor, Tensor, Tensor)"
)


def _outer(x: Tensor, scale: Tensor, inner: int) -> int:
    return x.numel() // max(1, scale.numel() * inner)


def _reference(x: Tensor, scale: Tensor, zero_point: Tensor, inner: int, grid: int, qmin: int, qmax: int) -> Tensor:
    return reference.fake_quant(x, scale, zero_point, _outer(x, scale, inner), scale.numel(), inner, qmin, qmax)


def _reference_backward(
    dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, inner: int, grid: int, qmin: int, qmax: int
) -> tuple[Tensor, Tensor, Tensor]:
    outer = _outer(x, scale, inner)
    return reference.fake_quant_backward(dy, x, scale, zero_point, outer, scale.numel(), inner, qmin, qmax)


def _fake_backward(dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *options: int) -> tuple[Tensor, ...]:
    return torch.empty_like(x), torch.empty_like(scale), torch.empty_like(zero_point)


_library.fallback("fake_quant", _reference)
_library.fallback("fake_quant_backward", _reference_backward)
_library.fake("fake_quant", lambda x, *rest: torch.empty_like(x))
_library.fake("fake_quant_backward", _fake_backward)
_forward = _library.operator("fake_quant")
_backward = _library.operator("fake_quant_backward")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dy.contiguous(), *ctx.saved_tensors, *ctx.options), None, None, None, None)


_library.autograd("fake_quant", _setup_context, _gradient)


def fake_quant(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    grid: IntegerGrid,
    granularity: Granularity = PerTensor(),  # noqa: B008  a frozen value
) -> Tensor:
    """Simulates quantization: y = (clamp(rint(x / scale) + rint(zero_point), qmin, qmax) - rint(zero_point)) * scale.

    Division, ties to even, in float32 (float64 for float64 x). NaN stays NaN, infinities clamp.

    Shape:
        x: any shape, float32, float64, bfloat16 or float16.
        scale, zero_point: one entry per tensor, channel, group or token, as ``channel_layout(granularity, x.shape)`` says;
        zero_point may be left out, which means 0.
        returns: like x.

    Gradient: straight-through for x inside [qmin, qmax], 0 outside; LSQ for scale (Esser et al., arXiv 1902.08153, without
    its step-size factor) and likewise for zero_point.

    Raises:
        UserError: if scale or zero_point does not have one entry per channel; names both shapes.
        RuntimeError: if a scale is zero, negative or not finite; names the entry.

    >>> fake_quant(torch.tensor([0.24, 0.26, 9.0]), torch.tensor(0.5), grid=IntegerGrid(4))
    tensor([0.0000, 0.5000, 3.5000])
    """
    layout = channel_layout(granularity, x.shape)
    for label, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.numel() != layout.channels:
            raise UserError(
                f"fake_quant: {label} has shape {list(tensor.shape)}, but {granularity} on x {list(x.shape)} "
                f"needs {list(layout.scale_shape)}"
            )
    scale, zero = (_library.parameter(tensor, x) for tensor in (scale, zero_point))
    result: Tensor = _forward(x.contiguous(), scale, zero, layout.inner, grid.kind, grid.qmin, grid.qmax)
    return result
