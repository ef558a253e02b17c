"""The L_p norm of a merged weight and its gradients in one pass, without building the merged weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.ops import _checks, _library, reference

_library.define(
    "lp_norm_query_key(Tensor weight, Tensor angle, Tensor log_scale, int group, bool inverse, float p) -> (Tensor, Tensor, Tensor)"
)
_library.define("lp_norm_scale(Tensor weight, Tensor row_log_scale, Tensor column_log_scale, float p) -> (Tensor, Tensor, Tensor)")
_library.fallback("lp_norm_query_key", reference.lp_norm_query_key)
_library.fallback("lp_norm_scale", reference.lp_norm_scale)


def _fake(weight: Tensor, first: Tensor, second: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return weight.new_empty((), dtype=torch.float64), torch.empty_like(first), torch.empty_like(second)


_library.fake("lp_norm_query_key", _fake)
_library.fake("lp_norm_scale", _fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    # The forward pass has computed the gradients already; as outputs of their own they have none.
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.options = len(inputs) - 3


def _backward(ctx: Any, dvalue: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    first, second = ctx.saved_tensors
    return None, dvalue.to(first.dtype) * first, dvalue.to(second.dtype) * second, *([None] * ctx.options)


_library.autograd("lp_norm_query_key", _setup_context, _backward)
_library.autograd("lp_norm_scale", _setup_context, _backward)
_lp_norm_query_key = _library.operator("lp_norm_query_key")
_lp_norm_scale = _library.operator("lp_norm_scale")


def lp_norm_query_key(
    weight: Tensor, angle: Tensor, log_scale: Tensor, *, group: int = 1, inverse: bool = False, p: float = 4.0
) -> Tensor:
    """sum |w'|^p of w' = merge_query_key(weight, angle, log_scale): the local objective of T_k.

    Shape:
        weight: [kv_heads * group * head_dim, in]; angle, log_scale: [kv_heads, head_dim / 2]. Returns: float64 scalar.

    Gradient: for angle and log_scale only (once; computed together with the value). Powers and sums in float64.

    Raises:
        UserError: if the shapes do not fit or p lies outside 1..16.

    >>> lp_norm_query_key(torch.ones(2, 3), torch.zeros(1, 1), torch.zeros(1, 1))
    tensor(6., dtype=torch.float64)
    """
    _checks.heads_of("lp_norm_query_key", weight, angle, log_scale, group)
    p = _checks.exponent("lp_norm_query_key", p)
    angle, log_scale = (_library.parameter(t, weight) for t in (angle, log_scale))
    value: Tensor = _lp_norm_query_key(weight.detach().contiguous(), angle, log_scale, group, inverse, p)[0]
    return value


def lp_norm_scale(
    weight: Tensor, row_log_scale: Tensor | None = None, column_log_scale: Tensor | None = None, *, p: float = 4.0
) -> Tensor:
    """sum |w'|^p of w' = merge_scale(weight, row_log_scale, column_log_scale): the local objective of T_u.

    Shape:
        weight: [R, C] or [R]; row_log_scale: [R] or None; column_log_scale: [C] or None. Returns: float64 scalar.

    Gradient: for the log scales only (once; computed together with the value). Powers and sums in float64.

    Raises:
        UserError: if the shapes do not fit or p lies outside 1..16.

    >>> lp_norm_scale(torch.full((2, 3), -2.0), p=2.0)
    tensor(24., dtype=torch.float64)
    """
    _checks.row_and_column("lp_norm_scale", weight, row_log_scale, column_log_scale)
    p = _checks.exponent("lp_norm_scale", p)
    row, column = (_library.parameter(t, weight) for t in (row_log_scale, column_log_scale))
    value: Tensor = _lp_norm_scale(weight.detach().contiguous(), row, column, p)[0]
    return value
