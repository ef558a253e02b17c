"""The operators: each a C kernel with a plain-torch fallback, differentiable where that makes sense."""

from fptquant._core import register_torch
from fptquant.ops.choose_qparams import choose_qparams
from fptquant.ops.coordinate_descent import coordinate_descent_
from fptquant.ops.cross_entropy import cross_entropy
from fptquant.ops.divergence import divergence
from fptquant.ops.fake_quant import fake_quant
from fptquant.ops.gptq import gptq_
from fptquant.ops.hadamard import hadamard, hadamard_matrix, hadamard_sizes
from fptquant.ops.kronecker import kronecker, kronecker_fake_quant, kronecker_fake_quant_dynamic
from fptquant.ops.linear_divergence import linear_cross_entropy, linear_divergence, linear_jsd
from fptquant.ops.lp_norm import lp_norm_query_key, lp_norm_scale
from fptquant.ops.merge_query_key import (
    merge_query_key,
    merge_query_key_fake_quant,
    query_key_moments,
)
from fptquant.ops.merge_scale import merge_scale, merge_scale_fake_quant, merge_scale_hadamard, scale_moments
from fptquant.ops.merge_value import merge_value
from fptquant.ops.pack_int4 import pack_int4, unpack_int4
from fptquant.ops.residual_scale import residual_scale
from fptquant.ops.rotate_blocks import rotate_blocks
from fptquant.ops.set_range import range_errors, range_histogram, range_minmax, range_qparams, set_range
from fptquant.ops.solve_query_key import solve_query_key

register_torch()

__all__ = [
    "choose_qparams",
    "coordinate_descent_",
    "cross_entropy",
    "divergence",
    "fake_quant",
    "gptq_",
    "hadamard",
    "hadamard_matrix",
    "hadamard_sizes",
    "kronecker",
    "kronecker_fake_quant",
    "kronecker_fake_quant_dynamic",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_jsd",
    "lp_norm_query_key",
    "lp_norm_scale",
    "merge_query_key",
    "merge_query_key_fake_quant",
    "merge_scale",
    "merge_scale_fake_quant",
    "merge_scale_hadamard",
    "merge_value",
    "pack_int4",
    "query_key_moments",
    "range_errors",
    "range_histogram",
    "range_minmax",
    "range_qparams",
    "residual_scale",
    "rotate_blocks",
    "scale_moments",
    "set_range",
    "solve_query_key",
    "unpack_int4",
]
