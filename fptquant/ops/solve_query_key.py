"""The closed form of local optimization for T_k at p = 4."""

from __future__ import annotations

from torch import Tensor

from fptquant.errors import UserError
from fptquant.ops import _library, reference

_library.define("solve_query_key(Tensor key_moments, Tensor query_moments) -> (Tensor, Tensor)")
_library.fallback("solve_query_key", reference.solve_query_key)
_library.fake("solve_query_key", lambda key, query: (key.new_empty(key.shape[:-1]), key.new_empty(key.shape[:-1])))
_solve = _library.operator("solve_query_key")


def solve_query_key(key_moments: Tensor, query_moments: Tensor) -> tuple[Tensor, Tensor]:
    """The rotation and scale of every RoPE pair that minimize s^4 f_k(phi) + s^-4 f_q(phi), in closed form.

    f(phi) = sum of the fourth powers of the pair after a rotation by phi = c0 + c1 cos 4 phi + c2 sin 4 phi. The best s
    for a given phi has s^8 = f_q / f_k; what remains, log f_k + log f_q over [0, pi/2), is searched on a dense grid
    and refined by halving. Pairs that are all zero on either side are left alone (0, 0).

    Shape:
        key_moments, query_moments: [kv_heads, head_dim / 2, 5] from ``query_key_moments`` (summed over each group).
        returns: (angle, log_scale), each [kv_heads, head_dim / 2] float64. No gradient.

    Raises:
        UserError: if the shapes differ or do not end in 5.
    """
    if key_moments.shape != query_moments.shape or key_moments.dim() < 1 or key_moments.shape[-1] != 5:
        raise UserError(
            f"solve_query_key: key_moments {list(key_moments.shape)} and query_moments {list(query_moments.shape)} "
            "must both be [kv_heads, head_dim / 2, 5]"
        )
    angle, log_scale = _solve(key_moments.double().contiguous(), query_moments.double().contiguous())
    return angle, log_scale
