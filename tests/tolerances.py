"""How far an operator may be from its plain-torch reference: one table, (operator, dtype) -> bound, with its derivation.

The bound is on |actual - expected| / max |expected|. Operator and reference round the same formula in the same dtype of
computation, so only three things may differ: a parameter's exponential, cosine or sine (computed in fp64 by two libraries,
so that after rounding it is the same or one unit in the last place off), the order of a sum, and the fp64 or fp32 product
under it. In units u = half a unit in the last place, of the dtype of storage and of the dtype of computation:

- one value whose parameters differ by one unit: 2 u of computation for each of two products, relative to values at most twice
  the result (a rotation cancels rarely): 8 u of computation; rounding to storage may then fall on the other side: 2 u.
- one value without such parameters, and anything that is only moved or counted: equal.
- a sum of n products: the terms are rounded three times in the dtype of computation (product, product, difference) and
  summed in fp64. The tests' sums have at most 1,000 terms, and sum |terms| <= 40 |result| there: 3 * 40 = 120 u, and 2 u for
  rounding the result.
- a Hadamard transform: each value is a sum of n terms by at most a additions (a = log2 and the dense orders): a u times
  sum |x| / sqrt(n) <= a u |x|_2 <= a u sqrt(n) max |y|; the table's entry is for one addition and sqrt(n) = 1.
- a divergence's loss: each term is at most 8 roundings (exponential 2, its sum's reciprocal 1, the decay 2, log share 3 or a
  polynomial) of at most twice its size where the two halves of a term nearly cancel (d = 1: 3.4): 16 u. The exponent of the
  larger probability is rounded to v u of the row's spread v; a term counts e^-v, and v e^-v < 0.4. All terms are positive.
- a divergence's gradient: the same for slopes, which are compared with the greatest entry of their token. 32 u: slopes of
  both signs. Rounding to storage: 1 u.
- a rotation of blocks, or a Kronecker product: sums of C, then of R products (R + C <= 73 in the tests, one sum of at most 128 in a
  rotation, of half the size), in the dtype of computation: 75 u times sum |left right x|, which is at most 20 max |y| there:
  1,500 u; its gradients are sums of the same kind. Rounding: 2 u.
- values through an fp64 sum and one division: 2 u of computation, 2 u of storage.
"""

from __future__ import annotations

import torch

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = tuple(UNIT)

_UNITS = {  # operator: (units of storage, units of computation)
    "hadamard": (0, 1),
    "kronecker": (2, 1500),
    "rotate_blocks": (2, 1500),
    "merge_query_key": (2, 8),
    "merge_query_key_backward": (2, 8),
    "merge_query_key_parameters": (0, 122),
    "merge_scale": (2, 8),
    "merge_scale_backward": (2, 8),
    "merge_scale_parameters": (0, 122),
    "merge_value": (2, 1000),  # matrix products and a solve of condition number about 100, both torch's
    "lp_norm": (0, 122),
    "query_key_moments": (0, 0),  # fp64 for every dtype: see MOMENTS
    "residual_scale": (2, 4),
    "residual_scale_backward": (2, 16),  # a difference of two terms that may cancel to a quarter
    "divergence": (0, 16),
    "divergence_gradient": (1, 32),
    "cross_entropy": (0, 16),
    "cross_entropy_gradient": (1, 32),
    "pack_int4": (0, 0),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computation of a dtype of storage."""
    return torch.float64 if dtype == torch.float64 else torch.float32


BOUNDS = {
    (operator, dtype): storage * UNIT[dtype] + compute * UNIT[compute_dtype(dtype)]
    for operator, (storage, compute) in _UNITS.items()
    for dtype in DTYPES
}
MOMENTS = 1000 * UNIT[torch.float64]  # fp64 sums of at most 1,000 terms in another order
