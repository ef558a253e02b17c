"""T_k: rotation and scale of the RoPE pairs of keys, undone in the queries."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.quantizers.grid import Granularity, IntegerGrid
from fptquant.transforms.base import Transform, compute_dtype, is_per_row

PairConstraint = Literal["none", "scale"]
"""What T_k may do to a RoPE pair: rotate and scale it, or scale it alone."""


class QueryKeyRotation(Transform):
    """Rotates the RoPE pairs of the keys by an angle and scales them; queries get the same rotation and 1 / scale.

    Pair i of a head is (x_i, x_j), j = i + D/2. With c = cos(angle), s = sin(angle), e = exp(log_scale):
    forward:       x'_i = e (c x_i - s x_j),  x'_j = e (s x_i + c x_j)            on keys
    forward_query: the same with 1 / e                                             on queries
    RoPE rotates the same pairs, and rotations of a plane commute, so every score q . k is unchanged. Query head h reads
    key head h // (heads / K). Under the constraint ``scale`` every angle stays 0.

    Shape: angle, log_scale [K, D/2]; keys [..., K * D], queries [..., heads * D], before RoPE; weights [rows, in] and
    biases [rows] of k_proj (side ``key``) and q_proj (side ``query``).

    Not function-preserving where a norm of queries and keys sits between projection and RoPE (Qwen3).

    Source: FPTQuant (arXiv 2506.04985), pre-RoPE transform.

    Raises:
        UserError: if head_dim is odd.
    """

    symbol: ClassVar[str] = "T_k"
    name: ClassVar[str] = "query_key_rotation"
    mergeable: ClassVar[bool] = True
    online: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("key", "query")

    angle: Tensor

    def __init__(self, num_kv_heads: int, head_dim: int, *, constraint: PairConstraint = "none") -> None:
        super().__init__()
        if head_dim % 2:
            raise UserError(f"T_k rotates pairs of dimensions: head_dim = {head_dim} must be even")
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.constraint: PairConstraint = constraint
        angle = torch.zeros(num_kv_heads, head_dim // 2)
        if constraint == "scale":
            self.register_buffer("angle", angle)
        else:
            self.register_parameter("angle", nn.Parameter(angle))
        self.log_scale = nn.Parameter(torch.zeros(num_kv_heads, head_dim // 2))

    def group(self, features: int) -> int:
        """Heads of ``features`` = heads * head_dim features that share one key head.

        Raises:
            UserError: if the features are not a whole number of heads per key head.
        """
        unit = self.num_kv_heads * self.head_dim
        if features % unit or features == 0:
            raise UserError(
                f"T_k of {self.num_kv_heads} key heads of {self.head_dim} dimensions does not fit {features} features: "
                f"a multiple of {unit} is needed"
            )
        return features // unit

    def _turn(self, x: Tensor, angle: Tensor, log_scale: Tensor) -> Tensor:
        dtype, group = compute_dtype(x), self.group(x.shape[-1])
        angle = angle.to(dtype).repeat_interleave(group, dim=0)
        scale = log_scale.to(dtype).exp().repeat_interleave(group, dim=0)
        first, second = x.to(dtype).reshape(*x.shape[:-1], -1, 2, self.head_dim // 2).unbind(-2)
        cosine, sine = angle.cos(), angle.sin()
        turned = (scale * (cosine * first - sine * second), scale * (sine * first + cosine * second))
        return torch.stack(turned, dim=-2).flatten(-3).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Transforms keys [..., K * D] before RoPE."""
        return self._turn(x, self.angle, self.log_scale)

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes ``forward`` on keys."""
        return self._turn(x, -self.angle, -self.log_scale)

    def forward_query(self, x: Tensor) -> Tensor:
        """Transforms queries [..., heads * D] before RoPE, so that their products with ``forward`` keys are unchanged."""
        return self._turn(x, self.angle, -self.log_scale)

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        group = self.group(weight.shape[0])
        return ops.merge_query_key(weight, self.angle, self.log_scale, group=group, inverse=side == "query")

    def merge_fake_quant(
        self, weight: Tensor, side: str, scale: Tensor, zero_point: Tensor | None, *, grid: IntegerGrid, granularity: Granularity
    ) -> Tensor:
        if not is_per_row(granularity):
            return super().merge_fake_quant(weight, side, scale, zero_point, grid=grid, granularity=granularity)
        self._check_side(side)
        return ops.merge_query_key_fake_quant(
            weight,
            self.angle,
            self.log_scale,
            scale,
            zero_point,
            group=self.group(weight.shape[0]),
            inverse=side == "query",
            grid=grid,
            granularity=granularity,
        )

    def describe(self) -> dict[str, Any]:
        scale = self.log_scale.detach().exp()
        return {
            **super().describe(),
            "key_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "smallest_scale": float(scale.min()),
            "largest_scale": float(scale.max()),
        }
