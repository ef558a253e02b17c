"""Kronecker-factored transforms of the last axis: plain, and fused with fake_quant of static or dynamic range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference
from fptquant.quantizers.grid import IntegerGrid

_ARGUMENTS = "Tensor x, Tensor left, Tensor right"
_QUANTIZER = "Tensor scale, Tensor zero_point, int grid, int qmin, int qmax"
_library.define(f"kronecker({_ARGUMENTS}) -> Tensor")
_library.define(f"kronecker_backward(Tensor dy, {_ARGUMENTS}, bool x_gradient) -> (Tensor, Tensor, Tensor)")
_library.define(f"kronecker_fake_quant({_ARGUMENTS}, {_QUANTIZER}) -> Tensor")
_library.define(
    f"kronecker_fake_quant_backward(Tensor dy, {_ARGUMENTS}, {_QUANTIZER}, bool x_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    f"kronecker_fake_quant_dynamic({_ARGUMENTS}, Tensor clip, float clip_ratio, bool symmetric, int grid, int qmin, int qmax) "
    "-> (Tensor, Tensor, Tensor)"
)

for _name in (
    "kronecker", "kronecker_backward", "kronecker_fake_quant", "kronecker_fake_quant_backward", "kronecker_fake_quant_dynamic",
):  # fmt: skip
    _library.fallback(_name, getattr(reference, _name))

_library.derivative("kronecker", 3)
_library.derivative("kronecker_fake_quant", 5)
_forward = _library.operator("kronecker")
_fused = _library.operator("kronecker_fake_quant")
_fused_backward = _library.operator("kronecker_fake_quant_backward")
_fused_dynamic = _library.operator("kronecker_fake_quant_dynamic")


def _fake_dynamic(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(x), _library.row_values(x), _library.row_values(x)


def _keep_ranges(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _dynamic_backward(ctx: Any, dy: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    """Ranges are constants for x; clip multiplies every scale."""
    if dy is None:
        return (None,) * 9
    x, left, right, clip, scale, zero = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    dx, dleft, dright, dscale, _ = _fused_backward(dy.contiguous(), x, left, right, scale, zero, *ctx.options, wanted)
    dclip = (dscale * scale).sum(dtype=torch.float64).to(clip.dtype) / clip if ctx.needs_input_grad[3] else None
    return dx if wanted else None, dleft, dright, dclip, *(None,) * 5


_library.fake("kronecker_fake_quant_dynamic", _fake_dynamic)
_library.autograd("kronecker_fake_quant_dynamic", _keep_ranges, _dynamic_backward)


def kronecker(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Multiplies the last axis by the Kronecker product of two matrices: y[..., :] = (left (x) right) x[..., :].

    With a row of x as a matrix X [R, C], y is left X right^T: R C (R + C) products where the whole matrix would take (R C)^2.
    A factor that is None is the identity, of the size that the other one leaves.

    Shape:
        x: [..., R * C], float32, float64, bfloat16 or float16; computed in float32 (float64 for float64).
        left: [R, R] or None; right: [C, C] or None; not both None.
        returns: like x.

    Gradient: for x and both factors (sums over the rows of x in float64).

    Raises:
        UserError: if both factors are None, or their sizes do not give the last axis of x.

    Source: FlatQuant, arXiv 2410.09426, section 3.1.

    >>> import torch
    >>> x, left, right = torch.arange(6.0), torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.eye(3)
    >>> kronecker(x, left, right), torch.equal(kronecker(x, left, right), torch.kron(left, right) @ x)
    (tensor([3., 5., 7., 3., 4., 5.]), True)
    """
    _check("kronecker", x, left, right)
    result: Tensor = _forward(x.contiguous(), _library.parameter(left, x), _library.parameter(right, x))
    return result


def kronecker_fake_quant(
    x: Tensor, left: Tensor | None, right: Tensor | None, scale: Tensor, zero_point: Tensor | None = None, *, grid: IntegerGrid
) -> Tensor:
    """fake_quant(kronecker(x)) without writing the transformed values.

    They are not rounded to the dtype of x in between; otherwise equal to the two operators in turn.

    Shape:
        x, left, right: as `kronecker`. scale, zero_point: one entry for all, or one for each row of x. Returns: like x.

    Gradient: for x (straight-through), both factors, scale and zero_point (LSQ).

    Raises:
        UserError: as `kronecker`, and if the number of scales fits neither.
    """
    _check("kronecker_fake_quant", x, left, right)
    rows = x.numel() // x.shape[-1]
    for label, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.numel() not in (1, rows):
            raise UserError(f"kronecker_fake_quant: {label} has {tensor.numel()} entries; x {list(x.shape)} needs 1 or {rows}")
    left, right, scale, zero = (_library.parameter(tensor, x) for tensor in (left, right, scale, zero_point))
    result: Tensor = _fused(x.contiguous(), left, right, scale, zero, grid.kind, grid.qmin, grid.qmax)
    return result


def kronecker_fake_quant_dynamic(
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    clip: Tensor | None = None,
    *,
    grid: IntegerGrid,
    clip_ratio: float = 1.0,
) -> Tensor:
    """fake_quant of kronecker(x) with the range of each row (`choose_qparams`), without writing the transformed values.

    They are not rounded to the dtype of x in between; otherwise equal to the three operators in turn.

    Args:
        clip: multiplies every scale, for training; None for 1.
        clip_ratio: as in `choose_qparams`.

    Shape:
        x, left, right: as `kronecker`. clip: one entry. Returns: like x.

    Gradient: for x (straight-through), both factors and clip (LSQ); none through the ranges.

    Raises:
        UserError: as `kronecker`, and if clip has not one entry.
        RuntimeError: if clip_ratio lies outside (0, 1], or clip is not positive and finite.
    """
    _check("kronecker_fake_quant_dynamic", x, left, right)
    if clip is not None and clip.numel() != 1:
        raise UserError(f"kronecker_fake_quant_dynamic: clip has {clip.numel()} entries; it needs 1")
    left, right, clip = (_library.parameter(tensor, x) for tensor in (left, right, clip))
    options = (float(clip_ratio), grid.symmetric, grid.kind, grid.qmin, grid.qmax)
    result: Tensor = _fused_dynamic(x.contiguous(), left, right, clip, *options)[0]
    return result


def _check(name: str, x: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    """At least one factor is there, both are square, and their sizes give the last axis."""
    given = [factor for factor in (left, right) if factor is not None]
    shapes = " and ".join("none" if factor is None else str(list(factor.shape)) for factor in (left, right))
    if not given or any(factor.dim() != 2 or factor.shape[0] != factor.shape[1] or not len(factor) for factor in given):
        raise UserError(f"{name}: left and right are {shapes}; at least one must be given, and they must be square matrices")
    size = 1
    for factor in given:
        size *= len(factor)
    if x.dim() == 0 or x.shape[-1] == 0 or (x.shape[-1] % size if len(given) == 1 else x.shape[-1] != size):
        raise UserError(f"{name}: x has shape {list(x.shape)}, which left and right of {shapes} do not fit")
