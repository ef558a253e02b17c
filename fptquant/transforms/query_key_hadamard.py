"""T_h: an online Hadamard transform of queries and keys after RoPE, for caches of few bits."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Transform


class QueryKeyHadamard(Transform):
    """Multiplies every head of queries and keys by the same Hadamard matrix, at run time.

    forward: x' = H x, H H^T = I;  inverse: x = H^T x'. Attention asks for products of queries and keys alone, and
    (H q) . (H k) = q . k. RoPE comes between the projections and this place, so nothing of it can be merged.

    Shape: queries [B, heads, T, D], keys [B, kv_heads, T, D], both after RoPE.

    Source: QuaRot (arXiv 2404.00456).

    Raises:
        UserError: if there is no Hadamard matrix of size head_dim.
    """

    symbol: ClassVar[str] = "T_h"
    name: ClassVar[str] = "query_key_hadamard"
    mergeable: ClassVar[bool] = False
    online: ClassVar[bool] = True
    sides: ClassVar[tuple[str, ...]] = ()

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        ops.hadamard(torch.zeros(head_dim))  # raises here, before any work, if there is no matrix of this size

    def forward(self, x: Tensor) -> Tensor:
        """Transforms queries or keys [..., D]."""
        return ops.hadamard(x)

    def forward_query(self, x: Tensor) -> Tensor:
        """As ``forward``: the matrix is orthogonal."""
        return self(x)  # type: ignore[no-any-return]

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes ``forward``."""
        return ops.hadamard(x, transpose=True)

    def merge_into(self, weight: Tensor, side: str) -> Tensor:
        raise UserError("T_h comes after RoPE: it acts at run time and cannot be merged into weights")
