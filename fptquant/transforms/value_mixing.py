"""T_v: an invertible matrix per key/value head on the values, undone in the output projection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fptquant import ops
from fptquant.errors import UserError
from fptquant.transforms.base import Start, Transform, compute_dtype, generator, start_matrix
from fptquant.transforms.matrix_exp import matrix_exp

Constraint = Literal["none", "orthogonal", "diagonal"]
"""What the matrices of T_v may be: any that can be inverted, or orthogonal, or diagonal ones."""

CONDITION_LIMIT = 1000.0
"""Bound on the condition number that training may add to a matrix's start."""


def bounded(exponent: Tensor) -> Tensor:
    """The exponents E, scaled down where needed so that cond(expm(E)) is at most `CONDITION_LIMIT`.

    cond(expm(E)) <= exp(2 |E|), and the spectral norm |E| is at most n(E) = sqrt(|E|_1 |E|_inf): E is multiplied by
    min(1, log(limit) / (2 n(E))). The factor counts as constant in the gradient.

    Shape: exponent and result [..., D, D].

    >>> large = bounded(20 * torch.eye(2).flip(0)[None].double())
    >>> round(float(torch.linalg.cond(torch.linalg.matrix_exp(large))))
    1000
    """
    size = exponent.detach().abs()
    norm = (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()
    factor = (math.log(CONDITION_LIMIT) / 2 / norm.clamp(min=1e-30)).clamp(max=1.0)
    return exponent * factor[..., None, None]


class ValueMixing(Transform):
    """Multiplies the values of each key/value head by an invertible matrix.

    M_k = expm(E_k) B_k, with the parameter E_k (``log_mixing``, zero at first) and the fixed base B_k. E_k is scaled down
    where it grows too large (`bounded`); under the constraint ``orthogonal`` it is replaced by its antisymmetric part
    E_k - E_k^T instead, and B_k is orthogonal; under ``diagonal`` by its diagonal, and B_k is diagonal.
    forward:  v' = M_k v;  inverse: v = M_k^-1 v'.
    Attention mixes tokens, not dimensions, so the matrix passes through it. The determinant of expm(E) is exp(trace E),
    never zero: no step of an optimizer can make M singular, and cond(M) <= `CONDITION_LIMIT` cond(B).

    Shape: log_mixing, base, matrix() [K, D, D]; values [..., K * D]; attention outputs [..., heads * D];
    v_proj weight [K * D, in] or bias [K * D] (side ``value``), o_proj weight [out, heads * D] (side ``output``; its
    bias is not touched).

    Source: FPTQuant (arXiv 2506.04985), multi-head value transform; the exponential parameter is this project's choice.

    Raises:
        UserError: if there is no Hadamard matrix of size head_dim (choose another start), or the constraint is unknown.
    """

    symbol: ClassVar[str] = "T_v"
    name: ClassVar[str] = "value_mixing"
    mergeable: ClassVar[bool] = True
    online: ClassVar[bool] = False
    sides: ClassVar[tuple[str, ...]] = ("value", "output")

    base: Tensor

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        *,
        start: Start = "hadamard",
        constraint: Constraint = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if constraint not in get_args(Constraint):
            raise UserError(f"constraint {constraint!r} is not known; choose one of {', '.join(get_args(Constraint))}")
        if constraint == "diagonal" and start != "identity":
            raise UserError(f"T_v that starts as {start} is not diagonal; set transforms.value_mixing.start=identity")
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.start: Start = start
        self.constraint: Constraint = constraint
        rng = generator(seed)
        self.register_buffer("base", torch.stack([start_matrix(start, head_dim, rng) for _ in range(num_kv_heads)]))
        self.log_mixing = nn.Parameter(torch.zeros(num_kv_heads, head_dim, head_dim))
        self.held: Tensor | None = None
        """The matrices of a training step, computed once for all the weights that need them (`hold_mixings`)."""

    def exponent(self) -> Tensor:
        """The matrices E [K, D, D], float64, whose exponential is taken."""
        raw = self.log_mixing.double()
        if self.constraint == "orthogonal":
            return raw - raw.mT
        return bounded(torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1)) if self.constraint == "diagonal" else raw)

    def matrix(self) -> Tensor:
        """The matrices M [K, D, D], float64, differentiable in ``log_mixing``."""
        if self.held is not None:
            return self.held
        mixing: Tensor = matrix_exp(self.exponent()) @ self.base
        return mixing

    def set_matrix_(self, matrix: Tensor) -> None:
        """Makes ``matrix`` [K, D, D] the base, and the parameter zero."""
        if matrix.shape != self.base.shape:
            raise UserError(f"T_v needs matrices of shape {list(self.base.shape)}, not {list(matrix.shape)}")
        with torch.no_grad():
            self.base.copy_(matrix)
            self.log_mixing.zero_()

    def condition_numbers(self) -> Tensor:
        """Largest over smallest singular value of each matrix, [K]."""
        numbers: Tensor = torch.linalg.cond(self.matrix().detach())
        return numbers

    def group(self, features: int) -> int:
        """Query heads that share one key/value head, where there are ``features`` = heads * head_dim in all."""
        unit = self.num_kv_heads * self.head_dim
        if features % unit or features == 0:
            raise UserError(
                f"T_v of {self.num_kv_heads} value heads of {self.head_dim} dimensions does not fit {features} "
                f"features: a multiple of {unit} is needed"
            )
        return features // unit

    def _multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        dtype, group = compute_dtype(x), self.group(x.shape[-1])
        heads = x.to(dtype).reshape(*x.shape[:-1], -1, self.head_dim)
        mixed: Tensor = matrix.to(dtype).repeat_interleave(group, dim=0) @ heads.unsqueeze(-1)
        return mixed.squeeze(-1).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Mixes values [..., K * D]."""
        return self._multiply(x, self.matrix())

    def inverse(self, x: Tensor) -> Tensor:
        """Undoes the mixing, of values [..., K * D] or of attention outputs [..., heads * D]."""
        return self._multiply(x, torch.linalg.inv(self.matrix()))

    def merge(self, weight: Tensor, side: str) -> Tensor:
        self._check_side(side)
        group = self.group(weight.shape[0 if side == "value" else -1])
        return ops.merge_value(weight, self.matrix(), group=group, inverse=side == "output")

    def randomize_(self, generator: torch.Generator | None = None, spread: float = 0.3) -> None:
        """Draws the parameter so that the condition numbers are alike, whatever the size."""
        super().randomize_(generator, spread / self.head_dim**0.5)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "start": self.start,
            "constraint": self.constraint,
            "largest_condition_number": float(self.condition_numbers().max()),
        }


def hold_mixings(transforms: Sequence[ValueMixing]) -> None:
    """Computes the matrices of many T_v in one go and lets each hold its own, until `release_mixings`.

    Small matrix exponentials one by one cost more time in calls than in arithmetic.
    """
    if not transforms:
        return
    exponents = torch.cat([transform.exponent() for transform in transforms])
    bases = torch.cat([transform.base for transform in transforms])
    held = matrix_exp(exponents) @ bases
    counts = [transform.num_kv_heads for transform in transforms]
    for transform, matrix in zip(transforms, held.split(counts), strict=True):  # type: ignore[no-untyped-call]
        transform.held = matrix


def release_mixings(transforms: Sequence[ValueMixing]) -> None:
    """Ends `hold_mixings`: matrices follow the parameters again."""
    for transform in transforms:
        transform.held = None
