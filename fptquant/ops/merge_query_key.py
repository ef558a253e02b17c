"""T_k merged into query and key projections: RoPE pairs of rows rotated and scaled; plain or with fake_quant."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _checks, _library, reference
from fptquant.quantizers.grid import Granularity, IntegerGrid, PerChannel

_library.define("merge_query_key(Tensor weight, Tensor angle, Tensor log_scale, int group, bool inverse) -> Tensor")
_library.define(
    "merge_query_key_backward(Tensor dy, Tensor weight, Tensor angle, Tensor log_scale, int group, bool inverse, "
    "bool weight_gradient) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "merge_query_key_fake_quant(Tensor weight, Tensor angle, Tensor log_scale, Tensor scale, Tensor zero_point, "
    "int group, bool inverse, int inner, int grid, int qmin, int qmax) -> Tensor"
)
_library.define(
    "merge_query_key_fake_quant_backward(Tensor dy, Tensor weight, Tensor angle, Tensor log_scale, Tensor scale, "
    "Tensor zero_point, int group, bool inverse, int inner, int grid, int qmin, int qmax, bool weight_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_library.define("query_key_moments(Tensor weight, int head_dim) -> Tensor")

for _name in (
    "merge_query_key",
    "merge_query_key_backward",
    "merge_query_key_fake_quant",
    "merge_query_key_fake_quant_backward",
    "query_key_moments",
):
    _library.fallback(_name, getattr(reference, _name))

_library.derivative("merge_query_key", 3)
_library.derivative("merge_query_key_fake_quant", 5)
_library.fake(
    "query_key_moments",
    lambda weight, head_dim: weight.new_empty((weight.shape[0] // head_dim, head_dim // 2, 5), dtype=torch.float64),
)

_merge = _library.operator("merge_query_key")
_merge_fake_quant = _library.operator("merge_query_key_fake_quant")
_moments = _library.operator("query_key_moments")


def merge_query_key(weight: Tensor, angle: Tensor, log_scale: Tensor, *, group: int = 1, inverse: bool = False) -> Tensor:
    """Rotates and scales the RoPE pairs of rows of a key projection (or, with ``inverse``, of a query projection).

    Rows i and j = i + head_dim / 2 of head h, with a = angle[h // group, i]:
    w'_i = s (cos a w_i - sin a w_j), w'_j = s (sin a w_i + cos a w_j), s = exp(log_scale[h // group, i]), or
    exp(-log_scale) if ``inverse``. Keys with s and queries with 1/s leave every attention score as it was.

    Shape:
        weight: [kv_heads * group * head_dim, in], or a bias [kv_heads * group * head_dim].
        angle, log_scale: [kv_heads, head_dim / 2], radians and natural logarithm.
        returns: like weight.

    Gradient: for weight, angle and log_scale (sums in float64).

    Raises:
        UserError: if the shapes do not fit; names them.

    Source: FPTQuant, arXiv 2506.04985, T_k.

    >>> merge_query_key(torch.eye(2), torch.tensor([[torch.pi / 2]]), torch.zeros(1, 1)).round().abs()
    tensor([[0., 1.],
            [1., 0.]])
    """
    _checks.heads_of("merge_query_key", weight, angle, log_scale, group)
    angle, log_scale = (_library.parameter(t, weight) for t in (angle, log_scale))
    result: Tensor = _merge(weight.contiguous(), angle, log_scale, group, inverse)
    return result


def merge_query_key_fake_quant(
    weight: Tensor,
    angle: Tensor,
    log_scale: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    group: int = 1,
    inverse: bool = False,
    grid: IntegerGrid,
    granularity: Granularity = PerChannel(),  # noqa: B008  a frozen value
) -> Tensor:
    """fake_quant(merge_query_key(weight)) without writing the merged weight.

    The merged value is not rounded to the dtype of weight in between; otherwise equal to the two operators in turn.

    Shape:
        weight: [kv_heads * group * head_dim, in]; angle, log_scale: [kv_heads, head_dim / 2].
        scale, zero_point: [rows] with PerChannel(0), [rows, 1] with PerToken, [rows, in / group_size] with PerGroup.
        returns: like weight.

    Gradient: for weight (straight-through), angle, log_scale, scale and zero_point (LSQ).

    Raises:
        UserError: if the shapes do not fit, or the granularity does not give one scale per row or group of a row.
    """
    _checks.heads_of("merge_query_key_fake_quant", weight, angle, log_scale, group)
    inner = _checks.fused_inner("merge_query_key_fake_quant", weight, scale, zero_point, granularity)
    angle, log_scale, scale, zero = (_library.parameter(t, weight) for t in (angle, log_scale, scale, zero_point))
    result: Tensor = _merge_fake_quant(
        weight.contiguous(), angle, log_scale, scale, zero, group, inverse, inner, grid.kind, grid.qmin, grid.qmax
    )
    return result


def query_key_moments(weight: Tensor, *, head_dim: int) -> Tensor:
    """Fourth-order moments of every RoPE pair of rows: all that the best T_k for p = 4 depends on.

    out[h, i] = sums over the columns of a^4, a^3 b, a^2 b^2, a b^3, b^4; a = weight[h d + i], b = weight[h d + i + d/2]

    Shape:
        weight: [heads * head_dim, in]. Returns: [heads, head_dim / 2, 5] float64. No gradient.

    Raises:
        UserError: if head_dim is odd or does not divide the rows.
    """
    if weight.dim() != 2 or head_dim < 2 or head_dim % 2 or weight.shape[0] % head_dim:
        raise UserError(
            f"query_key_moments: weight {list(weight.shape)} cannot be cut into heads of head_dim = {head_dim} rows "
            "(an even number)"
        )
    result: Tensor = _moments(weight.detach().contiguous(), head_dim)
    return result
